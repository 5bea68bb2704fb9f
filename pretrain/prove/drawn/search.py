"""Proofs of runs drawn at random, and the reduction of one that fails."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pretrain.config.compose import compose_config
from pretrain.prove.drawn.draw import Draw, draws
from pretrain.prove.errors import RunFailedError
from pretrain.prove.proof import Depth, prove
from pretrain.prove.report import first_failure
from pretrain.prove.small_run import SmallRun, shrink

_MOST_REFUSALS = 200


class Failure(NamedTuple):
    """A drawn run that is not proven, reduced, and the first check that fails in it."""

    draw: Draw
    reason: str


class Search(NamedTuple):
    """The findings of a search. `refusals`: reason -> draws that the config layer refused."""

    proven: int
    failures: list[Failure]
    refusals: Counter[str]

    @property
    def text(self) -> str:
        lines = [
            f"{self.proven} runs proven, {len(self.failures)} not, "
            f"{self.refusals.total()} draws refused:"
        ]
        lines += [f"  {count:5d}  {reason}" for reason, count in self.refusals.most_common()]
        for failure in self.failures:
            lines += [f"not proven: {failure.reason}", f"  {failure.draw.line}"]
        return "\n".join(lines)


def search(
    number: int,
    *,
    seed: int,
    minutes: float | None,
    family: str | None,
    log: Callable[[str], object],
) -> Search:
    """Prove `number` runs that the config layer accepts, or as many as `minutes` allow.

    Ends early when it refuses `_MOST_REFUSALS` draws in a row.
    """
    found, refused = Search(0, [], Counter()), 0
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for draw in draws(seed, family=family):
        tried = found.proven + len(found.failures)
        if refused >= _MOST_REFUSALS:
            return found
        if tried >= number or (end is not None and time.monotonic() > end):
            return found
        try:
            reason = failure_of(accepted(draw))
        except ValueError as error:
            found.refusals[kind_of(str(error))] += 1
            refused += 1
            continue
        refused = 0
        log(f"{tried + 1:4d} {'ok  ' if reason is None else 'FAIL'} {draw.line}")
        if reason is None:
            found = found._replace(proven=found.proven + 1)
        else:
            log(f"     {reason}")
            found.failures.append(reduce(draw, reason))
            log(f"     reduced: {found.failures[-1].draw.line}")
    raise AssertionError("draws never end")


def accepted(draw: Draw) -> SmallRun:
    """The small run of a draw.

    Raises:
        ValueError: the config layer refuses it.
    """
    config = compose_config(draw.run_file, config_dir=None, overrides=draw.settings)
    return shrink(config, draw.ds_config, max_ranks=draw.ranks, resume_batch=draw.resume_batch)


def failure_of(small: SmallRun) -> str | None:
    """The first check that fails, or None.

    Raises:
        ValueError: the program refuses the run when it starts.
    """
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        try:
            return first_failure(prove(small, Path(folder), depth=Depth.OWN))
        except RunFailedError as error:
            return str(error)


def reduce(draw: Draw, reason: str) -> Failure:
    """The simplest run found that fails in the same way: fewest ranks, fewest settings."""
    kind = kind_of(reason)
    for simpler in draw.simpler():
        try:
            found = failure_of(accepted(simpler))
        except ValueError:
            continue
        if found is not None and kind_of(found) == kind:
            return reduce(simpler, found)
    return Failure(draw, reason)


def kind_of(message: str) -> str:
    """A message without the numbers, paths and values that vary."""
    text = re.sub(r"\S*/\S*\.json", "FILE", " ".join(message.split()))
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", text)[:150]
