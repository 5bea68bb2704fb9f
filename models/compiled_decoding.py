"""Decoding steps as one compiled program with fixed buffers.

On CUDA a step of a small batch takes as long as its kernels take to launch. Compiled, it is one
graph that is replayed: shapes and addresses are the same in every step, so that attention reads the
room of all positions and hides those that do not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache as cached
from typing import Any
from weakref import WeakKeyDictionary

import torch

from models.common.cache import FixedKVCache
from parallel.carry import SequentialModel

_ROOM = 256  # positions by which the room of a cache grows
_MAX_PROGRAMS = 64  # of a process; torch compiles 8 unless told otherwise, and then raises

_Caches = Mapping[str, FixedKVCache]
# A model's buffers between two generations: a graph on CUDA is recorded for their addresses.
_kept: WeakKeyDictionary[SequentialModel, _Caches] = WeakKeyDictionary()


@contextmanager
def compiled_steps(
    model: SequentialModel, cache: Mapping[str, Any], *, length: int
) -> Iterator[Callable[[Any], Any]]:
    """`model(inputs, cache)` for inputs of one token per row, after a prompt of `length` tokens.

    `cache`: from `model.new_cache`, with the prompt in it, for these steps alone from here on. A
    program is compiled for each number of rows and of positions in the cache (`room_for`), and
    kept.

    Raises:
        ValueError: there is no prompt in the cache.
    """
    position = torch.tensor([length], device=model.ctx.device)
    caches = _in_kept_buffers(
        {
            name: model.get_submodule(name).fixed_cache(each, position)  # type: ignore[operator]
            for name, each in cache.items()
        },
        _kept.pop(model, None),
    )
    position = next(iter(caches.values())).position
    step = _compiled(model.ctx.device.type)

    def call(inputs: Any) -> Any:
        output = step(model, inputs, caches)
        position.add_(1)
        return output

    try:
        with torch._dynamo.config.patch(recompile_limit=_MAX_PROGRAMS):
            yield call
    finally:
        _kept[model] = caches


def room_for(length: int) -> int:
    """The `max_length` of a cache for so many positions: the next multiple of 256, so that texts of
    different length take one program."""
    return -(-length // _ROOM) * _ROOM


def _in_kept_buffers(caches: _Caches, kept: _Caches | None) -> _Caches:
    """The same state in the buffers of the generation before, if they fit."""
    if kept is not None and _layouts(kept) == _layouts(caches):
        for name, fixed in caches.items():
            for buffer, new in zip(kept[name], fixed, strict=True):
                buffer.copy_(new)
        return kept
    for fixed in caches.values():
        for buffer in (fixed.keys, fixed.values):
            torch._dynamo.mark_static_address(buffer, guard=False)
    return caches


def _layouts(caches: _Caches) -> list[Any]:
    return [(x.shape, x.dtype, x.device) for fixed in caches.values() for x in fixed]


def check_fixed_caches(model: SequentialModel) -> None:
    """Check that a decoding step of this model can be one program.

    Raises:
        ValueError: a layer's state has no fixed shape, or the model has tensor ranks.
    """
    if model.ctx.tensor.size > 1:
        raise ValueError(
            f"compiled=True with parallel.tensor={model.ctx.tensor.size} has no compiled form; "
            "decode without it, or in one process"
        )
    for name, layer in zip((spec.name for spec in model.specs), model.layers, strict=True):
        if hasattr(layer, "new_cache") and not hasattr(layer, "fixed_cache"):
            raise ValueError(
                f"compiled=True, but the state of {name} ({type(layer).__name__}) has no fixed "
                "shape; decode without it (--compile of models.generate)"
            )


@cached
def _compiled(device_type: str) -> Callable[..., Any]:
    mode = "reduce-overhead" if device_type == "cuda" else None
    return torch.compile(_step, mode=mode, fullgraph=True, dynamic=False)


def _step(model: SequentialModel, inputs: Any, caches: Mapping[str, Any]) -> Any:
    return model(inputs, caches)
