"""State of one pass through a stack, and the layers of the stack that take part.

Nothing outlives a pass but its losses and measurements: history is made anew by every forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.amrpa.config import AMRPAConfig
from models.amrpa.memory import Measured
from models.amrpa.targets import MemoryPlan


class Remembered(NamedTuple):
    """The entry of a layer: `query` after correction and rotation, `key`, and the arguments
    of their attention; or its `pattern` [b, n, s, t]; or its output `context` [b, n, s, d]."""

    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    options: dict[str, Any] | None = None
    pattern: Tensor | None = None
    context: Tensor | None = None


@dataclass
class Pass:
    """One pass through a stack. `real` bool [b, s]: tokens that are no padding, None for all.
    `called`, `routed`: calls of attention modules, and how many of them came to our function."""

    real: Tensor | None = None
    history: dict[int, Remembered] = field(default_factory=dict)
    measured: dict[int, Measured] = field(default_factory=dict)
    called: int = 0
    routed: int = 0


class StackState:
    """The memory of one stack: what is fixed at injection, and the pass that is under way."""

    def __init__(self, name: str, config: AMRPAConfig, plan: MemoryPlan) -> None:
        self.name = name
        self.config = config
        self.plan = plan
        self.layers: list[nn.Module] = []
        self.attention_mask: Tensor | None = None
        self.current = Pass()
        self.began = False
        self.replaying = False
        self._calls: Counter[int] = Counter()

    def begin(self, *_: Any) -> None:
        """Forget the last pass: a pre-hook of the stack."""
        self.current, self.began = Pass(real=self.attention_mask), True
        self._calls.clear()

    def release(self, *_: Any) -> None:
        """Let go of the history: a hook behind the stack, which may run without the whole model."""
        now = self.current
        self.current = Pass(now.real, {}, now.measured, now.called, now.routed)

    def end(self) -> Pass:
        """The pass that ended; its history is released."""
        ended, self.current = self.current, Pass()
        self.attention_mask, self.began = None, False
        return ended

    def depth(self, site: Site) -> int:
        """The layer that a call of an attention is; shared attention is called once per depth."""
        if len(site.depths) == 1:
            return site.depths[0]
        number = self._calls[id(site)]
        self._calls[id(site)] += 1
        return site.depths[number]

    def checkpointed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Let a checkpointing function recompute layers with the history of their own pass."""

        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept, calls, ran = self.current, Counter(self._calls), False

            def replayable(*inputs: Any, **named: Any) -> Any:
                nonlocal ran
                if not ran:
                    ran = True
                    return function(*inputs, **named)
                with self._replay(kept, calls):
                    return function(*inputs, **named)

            return run(replayable, *args, **kwargs)

        return checkpoint

    @contextmanager
    def _replay(self, kept: Pass, calls: Counter[int]) -> Iterator[None]:
        before = self.current, self._calls, self.replaying
        self.current, self._calls, self.replaying = kept, Counter(calls), True
        try:
            yield
        finally:
            self.current, self._calls, self.replaying = before

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model starts without a pass."""
        fresh: dict[str, Any] = {
            "current": Pass(),
            "attention_mask": None,
            "began": False,
            "_calls": Counter(),
        }
        return self.__dict__ | fresh


class Site:
    """An attention module's place in its stack: its depths, and the rotation of this call."""

    def __init__(self, stack: StackState, depths: list[int]) -> None:
        self.stack = stack
        self.depths = depths
        self.rotation: tuple[Tensor, Tensor] | None = None

    def take_rotation(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Count the call, and note `position_embeddings`: a pre-hook of the attention."""
        self.stack.current.called += 1
        self.rotation = kwargs.get("position_embeddings")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"rotation": None}


def wrap_checkpointing(layers: nn.Module, stack: StackState) -> None:
    """Wrap the checkpointing function of every layer of a stack that has one.

    Raises:
        ValueError: reentrant checkpointing, under which the losses have no gradient.
    """
    for layer in layers.modules():
        run = getattr(layer, "_gradient_checkpointing_func", None)
        if run is None or (isinstance(run, _Wrapped) and stack in run.stacks):
            continue
        wrapped = run if isinstance(run, _Wrapped) else _Wrapped(run, ())
        if getattr(wrapped.run, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True gives AMRPA's losses no gradient; enable gradient "
                "checkpointing with use_reentrant=False"
            )
        again: Any = _Wrapped(wrapped.run, (*wrapped.stacks, stack))
        layer._gradient_checkpointing_func = again


class _Wrapped:
    """A checkpointing function `run` for the layers of `stacks`; a copy of a model has the stacks
    of the copy."""

    def __init__(self, run: Callable[..., Any], stacks: tuple[StackState, ...]) -> None:
        self.run, self.stacks = run, stacks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        for stack in self.stacks:
            run = stack.checkpointed(run)
        return run(*args, **kwargs)
