"""Precision of a run: fp32, bf16 or FP8.

The only import of Transformer Engine is here; parallel.fp8 holds the layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.recompute import decision_contexts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
FP8_BACKENDS = ("transformer_engine", "torch", "emulated")


@dataclass(frozen=True)
class Precision:
    """`name` is fp32, bf16 or fp8; `fp8_recipe` names the FP8 scaling and is None otherwise.

    Under fp8 parameters and activations are bf16 and linear layers multiply in FP8: those of
    Transformer Engine, with the backend "torch" by torch's own kernels, or with "emulated" by
    rounded operands on any device. Without a usable Transformer Engine its backend is refused; it
    never falls back to another one or to bf16 silently.
    """

    name: str = "fp32"
    fp8_recipe: str | None = None
    fp8_backend: str = "transformer_engine"

    def __post_init__(self) -> None:
        if self.name not in DTYPES:
            raise ValueError(f"precision={self.name!r} is not one of {', '.join(DTYPES)}")
        if (self.fp8_recipe is not None) != self.is_fp8:
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe!r} with precision={self.name!r}: "
                "a recipe is needed with fp8 and has no effect without it; "
                "use both or neither"
            )
        if self.fp8_backend not in FP8_BACKENDS:
            raise ValueError(
                f"fp8_backend={self.fp8_backend!r} is unknown; use one of {', '.join(FP8_BACKENDS)}"
            )
        if self.is_fp8:
            self._check_recipe()

    def _check_recipe(self) -> None:
        if self.fp8_recipe not in FP8_RECIPES:
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe!r} is not one of {', '.join(FP8_RECIPES)}"
            )
        if self.fp8_backend == "transformer_engine":
            _require_recipe(self.fp8_recipe)
        elif self.fp8_backend == "torch":
            self._check_torch()
        elif self.fp8_recipe == "delayed":
            raise ValueError(
                "fp8_backend='emulated' with fp8_recipe='delayed': the emulation keeps no history "
                "of largest entries; use tensorwise, blockwise or mxfp8"
            )

    def _check_torch(self) -> None:
        if self.fp8_recipe != "tensorwise":
            raise ValueError(
                f"fp8_backend='torch' with fp8_recipe={self.fp8_recipe!r}: it has the recipe "
                "tensorwise alone; use that, or another backend"
            )
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
            raise ValueError(_too_old("fp8_backend='torch'"))

    @property
    def is_fp8(self) -> bool:
        return self.name == "fp8"

    @property
    def uses_transformer_engine(self) -> bool:
        return self.is_fp8 and self.fp8_backend == "transformer_engine"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters in the forward pass and of activations."""
        return DTYPES[self.name]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context manager around every forward pass: that of Transformer Engine, or none."""
        if not self.uses_transformer_engine:
            return contextlib.nullcontext()
        engine = require_transformer_engine()
        return engine.pytorch.autocast(enabled=True, recipe=fp8_recipe(str(self.fp8_recipe)))

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function` with activation checkpointing: recompute it in backward.

        Non-reentrant, so integer inputs and inputs without gradient are allowed. Random numbers and
        decisions (parallel.recompute) are replayed; Transformer Engine's own checkpoint also enters
        its autocast again.
        """
        options: dict[str, Any] = {"use_reentrant": False, "context_fn": decision_contexts}
        if self.uses_transformer_engine:
            engine = require_transformer_engine()
            return engine.pytorch.checkpoint(function, *args, **options)
        return torch.utils.checkpoint.checkpoint(function, *args, **options)


def require_transformer_engine() -> Any:
    """Import Transformer Engine.

    Raises:
        ValueError: there is no CUDA device with FP8, or the package cannot be imported.
    """
    # Its extension is built on the machine, against the torch that is there.
    remedy = (
        "install it on a CUDA machine with `pip install --no-build-isolation 'manyformer[fp8]'`, "
        "or use fp8_backend=torch, fp8_backend=emulated or precision=bf16"
    )
    if not torch.cuda.is_available():
        raise ValueError(f"precision=fp8 needs a CUDA device and Transformer Engine; {remedy}")
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise ValueError(_too_old("precision=fp8"))
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except Exception as error:  # a broken install raises RuntimeError and OSError, too
        raise ValueError(
            f"precision=fp8 needs Transformer Engine, which cannot be imported "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return transformer_engine


def _too_old(setting: str) -> str:
    return (
        f"{setting} needs a CUDA device of compute capability {FP8_CAPABILITY} or newer, this one "
        f"has {torch.cuda.get_device_capability()}; use precision=bf16"
    )


def _require_recipe(name: str) -> None:
    """Ask Transformer Engine whether this chip and CUDA have what a recipe needs."""
    engine = require_transformer_engine().pytorch
    available = {
        "blockwise": engine.is_fp8_block_scaling_available,
        "mxfp8": engine.is_mxfp8_available,
    }.get(name, engine.is_fp8_available)
    works, reason = available(return_reason=True)
    if not works:
        raise ValueError(
            f"fp8_recipe={name!r}: {reason}; use another recipe, such as tensorwise, or "
            "precision=bf16"
        )


@functools.cache
def fp8_recipe(name: str) -> Any:
    """Transformer Engine's recipe of a name in FP8_RECIPES."""
    from transformer_engine.common import recipe

    return {
        "delayed": recipe.DelayedScaling,
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }[name]()


def at_least_fp32(x: Tensor) -> Tensor:
    """Cast x to fp32 for softmax, norms, gates and losses; wider dtypes are kept, so that a model
    in fp64 computes in fp64. No copy if the dtype does not change."""
    return x.to(fp32_or_wider(x.dtype))


def fp32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
