"""Precision of a run: fp32, bf16, or FP8 through Transformer Engine (imported only here)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.recompute import decision_contexts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@dataclass(frozen=True)
class Precision:
    """`name` is fp32, bf16 or fp8; `fp8_recipe` names the FP8 scaling and is None otherwise.

    Under fp8 parameters and activations are bf16; the linear layers are Transformer Engine's and
    multiply in FP8. Without a usable Transformer Engine the setting is refused; it never falls back
    to bf16 silently.
    """

    name: str = "fp32"
    fp8_recipe: str | None = None

    def __post_init__(self) -> None:
        if self.name not in DTYPES:
            raise ValueError(f"precision={self.name!r} is not one of {', '.join(DTYPES)}")
        if (self.fp8_recipe is not None) != self.is_fp8:
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe!r} with precision={self.name!r}: "
                "a recipe is needed with fp8 and has no effect without it; "
                "use both or neither"
            )
        if self.is_fp8:
            if self.fp8_recipe not in FP8_RECIPES:
                raise ValueError(
                    f"fp8_recipe={self.fp8_recipe!r} is not one of {', '.join(FP8_RECIPES)}"
                )
            require_transformer_engine()

    @property
    def is_fp8(self) -> bool:
        return self.name == "fp8"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters in the forward pass and of activations."""
        return DTYPES[self.name]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context manager around every forward pass: FP8 autocast under fp8, else a no-op."""
        if not self.is_fp8:
            return contextlib.nullcontext()
        engine = require_transformer_engine()
        return engine.pytorch.fp8_autocast(enabled=True, fp8_recipe=_recipe(self.fp8_recipe))

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function` with activation checkpointing: recompute it in backward.

        Non-reentrant, so integer inputs and inputs without gradient are allowed. Random numbers and
        decisions (parallel.recompute) are replayed; under FP8 Transformer Engine's own checkpoint
        also replays the scaling state.
        """
        options: dict[str, Any] = {"use_reentrant": False, "context_fn": decision_contexts}
        if self.is_fp8:
            engine = require_transformer_engine()
            return engine.pytorch.checkpoint(function, *args, **options)
        return torch.utils.checkpoint.checkpoint(function, *args, **options)


def require_transformer_engine() -> Any:
    """Import Transformer Engine.

    Raises:
        ValueError: there is no CUDA device with FP8, or the package cannot be imported.
    """
    remedy = (
        "install it with `pip install manyformer[fp8]` on a CUDA machine, or use precision=bf16"
    )
    if not torch.cuda.is_available():
        raise ValueError(f"precision=fp8 needs a CUDA device and Transformer Engine; {remedy}")
    capability = torch.cuda.get_device_capability()
    if capability < FP8_CAPABILITY:
        raise ValueError(
            f"precision=fp8 needs a CUDA device of compute capability {FP8_CAPABILITY} or newer, "
            f"this one has {capability}; use precision=bf16"
        )
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except Exception as error:  # a broken install raises RuntimeError and OSError, too
        raise ValueError(
            f"precision=fp8 needs Transformer Engine, which cannot be imported "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return transformer_engine


def fp8_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    parallel_mode: str,
    tensor: Any,
    sequence_parallel: bool,
    device: torch.device,
) -> nn.Module:
    """A Transformer Engine linear layer with this tensor rank's shard (arguments are full sizes).

    Raises:
        ValueError: a local size is not a multiple of 16, as FP8 matrix products require.
    """
    engine = require_transformer_engine()
    local = {"column": out_features, "row": in_features}[parallel_mode] // tensor.size
    other = {"column": in_features, "row": out_features}[parallel_mode]
    if local % 16 or other % 16:
        raise ValueError(
            f"FP8 linear of {other} x {local} (per tensor rank): both must be multiples of 16; "
            "change the model's sizes or use precision=bf16"
        )
    return engine.pytorch.Linear(
        in_features,
        out_features,
        bias=bias,
        params_dtype=torch.bfloat16,
        device=device,
        parallel_mode=parallel_mode if tensor.size > 1 else None,
        tp_group=tensor.group if tensor.size > 1 else None,
        tp_size=tensor.size,
        sequence_parallel=sequence_parallel,
    )


def is_fp8_linear(layer: nn.Module) -> bool:
    """Whether `layer` comes from `fp8_linear`: own collectives, restricted row counts."""
    return type(layer).__module__.split(".")[0] == "transformer_engine"


def _recipe(name: str | None) -> Any:
    from transformer_engine.common import recipe

    return {
        "delayed": lambda: recipe.DelayedScaling(),
        "tensorwise": lambda: recipe.Float8CurrentScaling(),
        "blockwise": lambda: recipe.Float8BlockScaling(),
        "mxfp8": lambda: recipe.MXFP8BlockScaling(),
    }[str(name)]()


def at_least_fp32(x: Tensor) -> Tensor:
    """Cast x to fp32 for softmax, norms, gates and losses; wider dtypes are kept, so that a model
    in fp64 computes in fp64. No copy if the dtype does not change."""
    return x.to(fp32_or_wider(x.dtype))


def fp32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
