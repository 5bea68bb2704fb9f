"""Discrete decisions of layers, observed or replaced where two runs are compared.

Which tokens a layer computes, which experts a token has, which slots of memory it reads, whether a
loop ends: two runs whose scores differ by rounding may decide otherwise, and then differ by more
than rounding, without either being wrong. So whoever compares them observes the decisions of one,
gives them to the other, and asks how far scores would have to be off to explain each. Without an
observer this costs nothing.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class ScoreError(NamedTuple):
    """The error of scores that explains a choice; in its unit `scale`, their root mean square."""

    error: Tensor
    scale: Tensor


ErrorFor = Callable[[Any], ScoreError]
Observer = Callable[[Any, ErrorFor], Any]


class _Observed(threading.local):
    """The observer of this thread's decisions."""

    observer: Observer | None = None


_observed = _Observed()


def observed(decision: Made, error_for: Callable[[Made], ScoreError] | None) -> Made:
    """Return a decision, or what the observer of this thread puts in its place.

    `error_for(other)`: how far the scores of this decision must be off to decide `other`; None if
    the decision is not to be observed. In compiled code there is no observer.
    """
    if torch.compiler.is_compiling() or _observed.observer is None or error_for is None:
        return decision
    replaced: Made = _observed.observer(decision, error_for)
    return replaced


@contextlib.contextmanager
def observed_decisions(observer: Observer | None) -> Iterator[None]:
    """Let `observer(decision, error_for)` see every decision of this thread, and return what takes
    its place; None: nobody, for passes that are no part of a run."""
    before = _observed.observer
    _observed.observer = observer
    try:
        yield
    finally:
        _observed.observer = before


@torch.no_grad()
def error_of_largest(scores: Tensor, chosen: Tensor, dim: int) -> ScoreError:
    """The least error of `scores` with which those of the mask `chosen` are the largest along
    `dim`; infinite scores are exact."""
    lowest = scores.masked_fill(~chosen, math.inf).amin(dim=dim)
    highest = scores.masked_fill(chosen, -math.inf).amax(dim=dim)
    # Half of the distance on either side; forced on both, they are equal.
    error = ((highest - lowest) / 2).where(highest != lowest, 0.0).clamp(min=0.0)
    return ScoreError(error.max(), _root_mean_square(scores))


@torch.no_grad()
def error_of_threshold(
    scores: Tensor, threshold: Tensor | float, chosen: Tensor, *, room: int | None = None
) -> ScoreError:
    """The least error of `scores` with which those of the mask `chosen` exceed `threshold`; of
    those that do at most the `room` largest along the last dimension."""
    above = scores > threshold
    error = (scores - threshold).abs().where(above != chosen, 0.0)
    if room is not None:
        lowest = scores.masked_fill(~chosen, math.inf).amin(dim=-1, keepdim=True)
        is_full = chosen.sum(dim=-1, keepdim=True) == room
        beyond = ((scores - lowest) / 2).clamp(min=0.0)
        error = error.where(~(above & ~chosen & is_full), torch.minimum(error, beyond))
    return ScoreError(error.max(), _root_mean_square(scores))


def _root_mean_square(scores: Tensor) -> Tensor:
    finite = scores[scores.isfinite()]
    return finite.square().mean().sqrt() if len(finite) else scores.new_ones(())
