"""Decisions that activation recomputation must not take a second time.

A layer whose activations are recomputed runs its forward pass twice. Arithmetic may be repeated; a
discrete decision must not be: on a device whose sums depend on timing a near tie could fall the
other way, and what is counted would be counted twice. So `once` remembers, from the forward pass to
its repetition, what was decided.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

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


@torch.compiler.disable
def once(decide: Callable[[], T]) -> T:
    """What `decide()` returns; in a repeated forward pass what it returned in the first.

    What it returns has no gradient, and is asked for in the same order both times.
    """
    if _tape.values is None:
        return decide()
    if _tape.position is None:
        _tape.values.append(decide())
        return _tape.values[-1]
    value: T = _tape.values[_tape.position]
    _tape.position += 1
    return value


@contextlib.contextmanager
def _on_tape(values: list[Any], position: int | None) -> Iterator[None]:
    before = _tape.values, _tape.position
    _tape.values, _tape.position = values, position
    try:
        yield
    finally:
        _tape.values, _tape.position = before
