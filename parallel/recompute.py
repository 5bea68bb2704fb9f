"""Decisions that activation recomputation must not take a second time.

A layer whose activations are recomputed runs its forward pass twice. Arithmetic may be repeated; a
discrete decision must not be: on a device whose sums depend on timing a near tie could fall the
other way, and what is counted would be counted twice. So `once` remembers, from the forward pass to
its repetition, what was decided, and `count_once` counts in the first of them alone.

In compiled code both are operators that the compiler does not look into: the graph of a layer is
the same in both passes, decides again, and takes what was decided from the operator.
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

T = TypeVar("T")


class _Tape(threading.local):
    """Decisions of the checkpointed call that this thread is in; autograd has threads of its own.

    `values`: None outside of such a call. `position`: the next to repeat; None while recording.
    """

    values: list[Any] | None = None
    position: int | None = None


_tape = _Tape()


def decision_contexts() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """The `context_fn` of torch.utils.checkpoint: around the forward pass, and around its
    repetition."""
    values: list[Any] = []
    return _on_tape(values, None), _on_tape(values, 0)


def replay_decision(decide: Callable[[], T]) -> T:
    """What `decide()` returns; in a repeated forward pass what it returned in the first.

    What it returns has no gradient, and is asked for in the same order both times. In compiled code
    it may hold tensors in tuples, lists and NamedTuples.
    """
    if torch.compiler.is_compiling():
        leaves, structure = tree_flatten(decide())
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for i, kept in zip(places, _decided([leaves[i] for i in places]), strict=True):
            leaves[i] = kept
        return tree_unflatten(leaves, structure)
    return _on_tape_or_new(decide)


def count_once(total: Tensor, part: Tensor) -> None:
    """`total += part`, and in a repeated forward pass nothing; without gradient."""
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
    # Copies: compiled code may write over what it was given and over what it gives.
    kept = _on_tape_or_new(lambda: _copies(values))
    return _copies(kept)


def _count(total: Tensor, part: Tensor) -> None:
    if _tape.position is None:
        total.add_(part)


def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.clone() for value in values]


def _operator(run: Any, fake: Any, *, changes: tuple[str, ...] = ()) -> Any:
    """`run` as an operator, under a name of this copy of the module: an exported model has its own
    copy and may be loaded beside the project."""
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
