"""Phases of a step, which measurements and profiles enter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

Phase = Callable[[str], AbstractContextManager[Any]]

# DeepSpeed's instructions of a pipeline schedule (0.19.8, runtime/pipe/schedule.py), by phase.
PHASES = {
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "ReduceGrads": "reduction",
    "ReduceTiedGrads": "reduction",
    "OptimizerStep": "optimizer",
    "SendActivation": "pipeline",
    "RecvActivation": "pipeline",
    "SendGrad": "pipeline",
    "RecvGrad": "pipeline",
}


@contextlib.contextmanager
def all_of(phases: Iterable[Phase], name: str) -> Iterator[None]:
    """Enter a phase for several purposes."""
    with contextlib.ExitStack() as stack:
        for phase in phases:
            stack.enter_context(phase(name))
        yield


def in_phase(phase: Phase, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, called in a phase."""

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with phase(name):
            return run(*args, **kwargs)

    return recorded
