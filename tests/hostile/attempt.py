"""A spoilt input, and how a command has to meet it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.hostile.commands import Outcome, fault_of_refusal


class Attempt(NamedTuple):
    """A spoilt input. `names`: one of them must be in the refusal. `unheard` tells what is wrong
    with an outcome that is no refusal; None where nothing is."""

    what: str
    run: Callable[[], Outcome]
    refuse: bool
    names: tuple[str, ...]
    unheard: Callable[[Outcome], str | None] = lambda outcome: None

    def fault(self) -> str | None:
        """The fault of the command; None if it did right."""
        outcome = self.run()
        if outcome.crash or outcome.code != 0:
            return fault_of_refusal(outcome, self.names)
        if self.refuse:
            return f"accepted: {outcome.out[-300:]}"
        return self.unheard(outcome)
