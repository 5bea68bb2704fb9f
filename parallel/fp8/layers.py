"""The tensor-parallel linear layer of FP8.

Collectives are those of `parallel.regions`, in bf16, around a product that knows nothing of them:
Transformer Engine's (`te.pytorch.Linear` without a parallel mode), torch's own or the emulated one.
So several layers share one gather (`parallel.layers.project_together`), and backends differ in the
product alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.fp8 import scaled
from parallel.fp8.emulation import fp8_product
from parallel.fp8.history import pack_history, unpack_history
from parallel.precision import fp8_recipe, require_transformer_engine
from parallel.regions import copy_to_tensor_region, gather_sequence, reduce_from_tensor_region


class _Multiples(NamedTuple):
    """Multiples that the kernels ask of operands: tokens are rows, features are columns."""

    rows: int
    columns: int


def _multiples(ctx: ParallelContext) -> _Multiples:
    if ctx.precision.fp8_backend == "torch":
        return _Multiples(scaled.MULTIPLE, scaled.MULTIPLE)
    return _Multiples(32, 32) if ctx.precision.fp8_recipe == "mxfp8" else _Multiples(8, 16)


def fp8_linear(mode: str, shape: tuple[int, int], *, bias: bool, ctx: ParallelContext) -> nn.Module:
    """A linear layer in FP8 with this tensor rank's shard [out, in]; `mode`: column or row.

    Raises:
        ValueError: sizes of the shard that FP8 matrix products cannot have.
    """
    multiple = _multiples(ctx).columns
    if shape[0] % multiple or shape[1] % multiple:
        raise ValueError(
            f"FP8 linear of {shape[1]} x {shape[0]} (per tensor rank): with fp8_recipe="
            f"{ctx.precision.fp8_recipe} both must be multiples of {multiple}; change the model's "
            "sizes or parallel.tensor, or use training.precision=bf16"
        )
    kinds = {"emulated": _EmulatedLinear, "torch": _ScaledLinear}
    kind = kinds.get(ctx.precision.fp8_backend) or _transformer_engine_linear()
    layer: nn.Module = kind(mode, shape, bias=bias, ctx=ctx)
    return layer


class _Fp8Linear(nn.Module, ABC):
    """Collectives around the product of a subclass.

    `collectives=False` and `per_token=False` are those of `parallel.layers`: the latter is for
    memory slots and the like, whose number FP8 products cannot have; they multiply in bf16.
    """

    weight: Tensor
    mode: str
    has_bias: bool
    ctx: ParallelContext

    @abstractmethod
    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The local product of FP8 operands, and the bias, which is not added."""

    def forward(self, x: Tensor, *, collectives: bool = True, per_token: bool = True) -> Tensor:
        column = self.mode == "column"
        if column and collectives:
            x = copy_to_tensor_region(gather_sequence(x, ctx=self.ctx), ctx=self.ctx)
        if per_token:
            self._check_rows(x)
            y, bias = self.product(x)
        else:
            y = F.linear(x, self.weight)
            bias = self.get_parameter("bias") if self.has_bias else None
        if not column:
            if not collectives:
                return y
            y = reduce_from_tensor_region(y, ctx=self.ctx)
        return y if bias is None else y + bias

    def _check_rows(self, x: Tensor) -> None:
        multiple, rows = _multiples(self.ctx).rows, x.shape[:-1].numel()
        if rows % multiple:
            raise ValueError(
                f"FP8 product of {rows} rows ({' x '.join(map(str, x.shape[:-1]))}): with "
                f"fp8_recipe={self.ctx.precision.fp8_recipe} a multiple of {multiple} is needed; "
                "change training.batch_size, the sequence length or the model's capacity, or use "
                "training.precision=bf16"
            )


class _EmulatedLinear(_Fp8Linear, nn.Linear):
    def __init__(
        self, mode: str, shape: tuple[int, int], *, bias: bool, ctx: ParallelContext
    ) -> None:
        nn.Linear.__init__(self, shape[1], shape[0], bias=bias, device=ctx.device)
        self.mode, self.has_bias, self.ctx = mode, bias, ctx

    def reset_parameters(self) -> None:
        """Do nothing: parallel.random.initialize, which has the parameter's name, fills it."""

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return fp8_product(x, self.weight, str(self.ctx.precision.fp8_recipe)), self.bias


class _ScaledLinear(_EmulatedLinear):
    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return scaled.scaled_product(x, self.weight), self.bias


@cache
def _transformer_engine_linear() -> Any:
    """The class, which is made once Transformer Engine is imported."""
    engine = require_transformer_engine()

    class TransformerEngineLinear(_Fp8Linear, engine.pytorch.Linear):  # type: ignore[name-defined]
        fp8_meta: dict[str, Any]
        init_fp8_meta_tensors: Callable[[Any], None]

        def __init__(
            self, mode: str, shape: tuple[int, int], *, bias: bool, ctx: ParallelContext
        ) -> None:
            engine.pytorch.Linear.__init__(
                self,
                shape[1],
                shape[0],
                bias=bias,
                return_bias=bias,  # added here, after the reduction
                params_dtype=torch.bfloat16,
                device=ctx.device,
            )
            self.mode, self.has_bias, self.ctx = mode, bias, ctx

        def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            y = engine.pytorch.Linear.forward(self, x)
            return y if self.has_bias else (y, None)

        def get_extra_state(self) -> Tensor:
            return pack_history(self.fp8_meta)

        def set_extra_state(self, state: Tensor) -> None:
            if state.numel() == 0:
                return
            # As Transformer Engine's own (2.20, module/base.py): what the first step would make.
            recipe = fp8_recipe(str(self.ctx.precision.fp8_recipe))
            self.fp8_meta.update(num_gemms=1, recipe=recipe)
            self.init_fp8_meta_tensors(recipe)
            unpack_history(state, self.fp8_meta)

    return TransformerEngineLinear
