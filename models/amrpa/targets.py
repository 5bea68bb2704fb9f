"""Layers that use memory, and the earlier layers that each of them reads. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from models.amrpa.settings import MemorySettings

_COUNTED = re.compile(r"(first|last|middle)_(\d+)")
_SLICE = re.compile(r"(-?\d*):(-?\d*)(?::(-?\d*))?")
_FORMS = "'all', 'first_N', 'last_N', 'middle_N', 'a:b', 'a:b:c' or a list of layers"


def resolve_targets(targets: str | Sequence[int], num_layers: int) -> list[int]:
    """The layers, counted from 0, that `targets` names in a stack of `num_layers`, in order.

    `all`; `first_N`, `last_N`, `middle_N` with N at most all layers; a slice `a:b` or `a:b:c` as in
    Python; a list of layers.

    Raises:
        ValueError: the text has none of these forms, names no layer, or a layer is out of range.
    """
    layers = range(num_layers)
    if not isinstance(targets, str):
        return _listed(targets, num_layers)
    if targets == "all":
        return list(layers)
    if counted := _COUNTED.fullmatch(targets):
        count = min(int(counted[2]), num_layers)
        start = {"first": 0, "last": num_layers - count, "middle": (num_layers - count) // 2}
        chosen = list(layers[start[counted[1]] :][:count])
    elif part := _SLICE.fullmatch(targets):
        bounds = [int(text) if text else None for text in part.groups()]
        if bounds[2] == 0:
            raise ValueError(f"target_layers={targets!r} has step 0; choose another step")
        chosen = sorted(layers[slice(*bounds)])
    else:
        raise ValueError(f"target_layers={targets!r} is not understood; use {_FORMS}")
    if not chosen:
        raise ValueError(
            f"target_layers={targets!r} names none of the {num_layers} layers; choose at least one"
        )
    return chosen


def _listed(targets: Sequence[int], num_layers: int) -> list[int]:
    wrong = [each for each in targets if type(each) is not int or not 0 <= each < num_layers]
    if wrong or not targets:
        raise ValueError(
            f"target_layers={list(targets)!r} must list layers from 0 to {num_layers - 1}; "
            + (f"remove {wrong[0]!r}" if wrong else "name at least one")
        )
    return sorted(set(targets))


def targets_by_stack(targets: str | Sequence[int], sizes: dict[str, int]) -> dict[str, list[int]]:
    """The target layers of each stack: name -> number of layers in, name -> targets out.

    `targets` applies to every stack, or with a prefix (`encoder:last_4`, `decoder:6:10`) to one.

    Raises:
        ValueError: as `resolve_targets`, or the model has no stack of this name.
    """
    prefix, _, rest = targets.partition(":") if isinstance(targets, str) else ("", "", "")
    if prefix.isalpha() and prefix != "all":
        if prefix not in sizes:
            raise ValueError(
                f"target_layers={targets!r} names the stack {prefix!r}, and the model has "
                f"{', '.join(sizes)}; name one of them"
            )
        if not rest:
            raise ValueError(
                f"target_layers={targets!r} names a stack and none of its layers; add {_FORMS}"
            )
        return {prefix: resolve_targets(rest, sizes[prefix])}
    return {name: resolve_targets(targets, size) for name, size in sizes.items()}


def window_size(layer: int, config: MemorySettings) -> int:
    """The most earlier layers that a layer, counted from 1, reads.

    `min(l - 1, max_window_size, w(l))` with the adaptive w = 1 for l <= 2, floor(log2 l) + 1 for
    l <= 8, and 4 above.
    """
    window = min(layer - 1, config.max_window_size)
    if not config.adaptive_window:
        return window
    adaptive = 1 if layer <= 2 else layer.bit_length() if layer <= 8 else 4
    return min(window, adaptive)


class MemoryPlan(NamedTuple):
    """`reads`: target layer -> the layers that it reads, nearest first. `recorded`: their union."""

    reads: dict[int, tuple[int, ...]]
    recorded: frozenset[int]


def plan_memory(
    targets: Sequence[int], config: MemorySettings, layer_types: Sequence[str]
) -> MemoryPlan:
    """Plan the memory of a stack with one entry of `layer_types` per layer.

    A layer reads earlier layers of its own type alone: in a cache, layers with a sliding window
    keep other keys than those without one. A target without any is left as it is.

    Raises:
        ValueError: no target has an earlier layer to read.
    """
    remembered = set(range(len(layer_types)) if config.history_scope == "all" else targets)
    reads: dict[int, tuple[int, ...]] = {}
    for layer in targets:
        earlier = [
            i for i in range(layer) if i in remembered and layer_types[i] == layer_types[layer]
        ]
        nearest = tuple(reversed(earlier))[: window_size(layer + 1, config)]
        if nearest:
            reads[layer] = nearest
    if not reads:
        raise ValueError(
            f"target_layers={config.target_layers!r}: layers {list(targets)} have no earlier layer "
            "to read; choose deeper ones"
        )
    return MemoryPlan(reads, frozenset(layer for each in reads.values() for layer in each))


def plan_layers(settings: MemorySettings, num_layers: int) -> MemoryPlan:
    """The plan of a stack of `num_layers` layers of one kind.

    Raises:
        ValueError: as `resolve_targets` and `plan_memory`.
    """
    targets = resolve_targets(settings.target_layers, num_layers)
    return plan_memory(targets, settings, ["full"] * num_layers)


def live_after(plan: MemoryPlan, layer: int) -> tuple[int, ...]:
    """The layers up to `layer` that a later one reads, in order: what a stage that ends with
    `layer` hands on."""
    later = [reads for target, reads in plan.reads.items() if target > layer]
    return tuple(sorted({i for reads in later for i in reads if i <= layer}))
