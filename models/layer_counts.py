"""Parameters and FLOPs of a model, counted from its layers on the meta device.

For families without closed forms. Takes no memory and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from parallel.carry import LayerSpec
from parallel.context import ParallelContext


def count_parameters(specs: Iterable[LayerSpec]) -> int:
    """Parameters of all layers; a tied one counts once."""
    return sum(
        parameter.numel()
        for spec, layer in layers_without_memory(specs)
        for path, parameter in layer.named_parameters()
        if path not in spec.tied
    )


def count_flops(specs: Iterable[LayerSpec], seq_length: int, *, family: str) -> float:
    """Forward FLOPs per token of a sequence of `seq_length`, two per multiply-add.

    Every linear layer is applied once per token: `2 in out`. A module with other products gives
    their cost in `flops_per_token(seq_length)`, excluding its linear layers: attention, or a
    parameter that is not the weight of a linear layer. Look-ups, norms and activations are not
    counted.

    Raises:
        ValueError: a matrix belongs to no linear layer and its module does not give its cost.
    """
    total = 0.0
    for spec, layer in layers_without_memory(specs):
        for path, module in layer.named_modules():
            if hasattr(module, "flops_per_token"):
                total += module.flops_per_token(seq_length)
            elif isinstance(module, nn.Linear):
                total += 2.0 * module.weight.numel()
            else:
                _check_has_no_matrix(module, ".".join(filter(None, (spec.name, path))), family)
    return total


def layers_without_memory(specs: Iterable[LayerSpec]) -> Iterator[tuple[LayerSpec, nn.Module]]:
    """Build the layers of a model on the meta device, one at a time.

    Raises:
        ValueError: a tensor of the model is larger than any memory.
    """
    ctx = ParallelContext.single(device="meta")
    for spec in specs:
        try:
            layer = spec.module(ctx=ctx, **spec.kwargs)
        except (RuntimeError, TypeError, OverflowError) as error:
            if not isinstance(error, OverflowError) and "overflow" not in str(error).lower():
                raise
            raise ValueError(
                f"{spec.name}: the sizes in the model's configuration ask for a tensor that no "
                "memory holds; correct them"
            ) from error
        yield spec, layer


def _check_has_no_matrix(module: nn.Module, path: str, family: str) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1 and getattr(parameter, "role", None) != "embedding":
            raise ValueError(
                f"the FLOPs of {path}.{name} {list(parameter.shape)} are unknown: it is no weight "
                f"of a linear layer; give {type(module).__name__} a method "
                f"flops_per_token(seq_length), or the {family} family its counts"
            )
