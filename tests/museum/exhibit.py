"""An exhibit: a bug of another stack, re-created as a mutation of the code that prevents it."""

from __future__ import annotations

from typing import NamedTuple

from tests.faults.mutation import Mutant


class Source(NamedTuple):
    """The report of the bug.

    `project`: owner/name on GitHub. `number`: of the issue or pull request. `what`: the bug in one
    sentence, as it was there.
    """

    project: str
    number: int
    what: str

    @property
    def link(self) -> str:
        # GitHub redirects the number of a pull request to its page.
        return f"[{self.project}#{self.number}](https://github.com/{self.project}/issues/{self.number})"


class Exhibit(NamedTuple):
    """`mutant`: the bug; its `tests` are others of that area, if any, some of which fail with it.

    `proof`: arguments of `python -m pretrain.prove` for a run that has what the bug needs. `case`:
    the family whose contract tests are tried.
    """

    source: Source
    mutant: Mutant
    proof: tuple[str, ...]
    case: str = "llama"


def proof_of(model: str, *settings: str, ranks: int = 2) -> tuple[str, ...]:
    """Arguments of a proof of the demonstration with this model, on at most so many ranks.

    The run does not compare replicas by itself, which would end it before the proof sees anything.
    """
    alone = "watchdog.replica_interval=null"
    return ("--config-name", "demo", "--ranks", str(ranks), f"model={model}", *settings, alone)
