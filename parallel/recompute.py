"""Discrete decisions under activation recomputation.

A layer whose activations are recomputed runs its forward pass twice. Arithmetic may be repeated;
discrete decisions must not be: on a device whose sums depend on timing a near tie could be broken
the other way, and counters would count twice. So `replay_decision` records a decision in the
forward pass and replays it in the recomputation, and `count_once` counts in the first pass alone.

In compiled code both are opaque operators: the graph of a layer is the same in both passes; it
computes the decision again and takes the recorded one from the operator.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from parallel.decisions import ScoreError, observed

T = TypeVar("T")


class _Tape(threading.local):
    """Recorded decisions of this thread's checkpointed call; autograd has threads of its own.

    `values`: None outside of such a call. `position`: the next one to replay; None while recording.
    """

    values: list[Any] | None = None
    position: int | None = None


_tape = _Tape()


def decision_contexts() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """`context_fn` for torch.utils.checkpoint: contexts of the forward pass and of its
    recomputation."""
    values: list[Any] = []
    return _on_tape(values, None), _on_tape(values, 0)


def replay_decision(
    decide: Callable[[], T], error_for: Callable[[T], ScoreError] | None = None
) -> T:
    """Return `decide()`; in a recomputed forward pass, its result in the first pass.

    Results have no gradient, and both passes ask for them in the same order. In compiled code a
    result may hold tensors in tuples, lists and NamedTuples. `error_for`: as in
    `parallel.decisions.observed`.
    """
    if torch.compiler.is_exporting():  # a program in which nothing is computed again
        return decide()
    if torch.compiler.is_compiling():
        leaves, structure = tree_flatten(decide())
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for i, kept in zip(places, _decided([leaves[i] for i in places]), strict=True):
            leaves[i] = kept
        return tree_unflatten(leaves, structure)
    return _on_tape_or_new(lambda: observed(decide(), error_for))


def count_once(total: Tensor, part: Tensor) -> None:
    """`total += part` without gradient; no effect in a recomputed forward pass."""
    add = _counted if torch.compiler.is_compiling() else _count
    add(total, part)


def _on_tape_or_new(decide: Callable[[], T]) -> T:
    if _tape.values is None:
        return decide()
    if _tape.position is None:
        _tape.values.append(decide())
        return _tape.values[-1]
    value: T = _tape.values[_tape.position]
    _tape.position += 1
    return value


def _decide(values: Sequence[Tensor]) -> list[Tensor]:
    # Copies: compiled code may overwrite its inputs and its outputs.
    kept = _on_tape_or_new(lambda: _copies(values))
    return _copies(kept)


def _count(total: Tensor, part: Tensor) -> None:
    if _tape.position is None:
        total.add_(part)


def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.clone() for value in values]


def _operator(run: Any, fake: Any, *, changes: tuple[str, ...] = ()) -> Any:
    """Register `run` as an operator whose name is unique to this copy of the module: an exported
    model has its own copy and may be loaded beside the project."""
    name = f"manyformer_{zlib.crc32(__name__.encode()):x}::{run.__name__.strip('_')}"
    operator: Any = torch.library.custom_op(name, run, mutates_args=changes)
    operator.register_fake(fake)
    return operator


_decided = _operator(_decide, _copies)
_counted = _operator(_count, lambda total, part: None, changes=("total",))


@contextlib.contextmanager
def _on_tape(values: list[Any], position: int | None) -> Iterator[None]:
    before = _tape.values, _tape.position
    _tape.values, _tape.position = values, position
    try:
        yield
    finally:
        _tape.values, _tape.position = before
