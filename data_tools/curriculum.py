"""The stages of a run in steps: how long each lasts, what it mixes, how long its sequences are.

Letters: N steps, M tokens of a run, G sequences of a step (of all ranks), L the sequence length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_tools.config import DataConfig
from data_tools.errors import DataError


class Stage(NamedTuple):
    """Steps (`first_step`, end] of a run, the end being the next stage's `first_step`."""

    first_step: int  # steps taken before it
    weights: Mapping[str, float]
    sequence_length: int
    model: Mapping[str, Any]


class Curriculum:
    """The stages of one run; a run without a curriculum has one stage."""

    def __init__(
        self, stages: Sequence[Stage], *, sequences_per_step: int, total_steps: int
    ) -> None:
        self.stages = tuple(stages)
        self.sequences_per_step = sequences_per_step
        self.total_steps = total_steps
        self._first_steps = [stage.first_step for stage in self.stages]

    def stage_after(self, steps: int) -> Stage:
        """The stage of the step that follows the first `steps`."""
        return self.stages[bisect_right(self._first_steps, steps) - 1]

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps take."""
        ends = [*self._first_steps[1:], steps]
        return self.sequences_per_step * sum(
            stage.sequence_length * max(0, min(end, steps) - stage.first_step)
            for stage, end in zip(self.stages, ends, strict=True)
        )

    def describe(self) -> str:
        """A line for each stage: its steps, tokens and mix."""
        ends = [*self._first_steps[1:], self.total_steps]
        return "\n".join(
            f"steps {stage.first_step + 1:,} to {end:,}: "
            f"{self.sequences_per_step * stage.sequence_length:,} tokens a step, "
            f"{self.sequences_per_step:,} x {stage.sequence_length:,}, {_shares(stage.weights)}"
            for stage, end in zip(self.stages, ends, strict=True)
        )


def _shares(weights: Mapping[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.1%}" for name, weight in weights.items())


def plan_curriculum(
    config: DataConfig, *, sequences_per_step: int, max_steps: int | None, max_tokens: int | None
) -> Curriculum:
    """Lay the stages out over a run of `max_steps` steps or `max_tokens` tokens, what is shorter.

    A run that `max_tokens` ends takes the first step that reaches it, and so does a stage that
    ends at a fraction of it.

    Raises:
        DataError: a stage gets no step.
    """
    lengths = [stage.sequence_length or config.sequence_length for stage in config.stages]
    lengths = lengths or [config.sequence_length]
    tokens = [sequences_per_step * length for length in lengths]  # of a step of each stage
    ends = _ends(config, tokens, max_steps, max_tokens)
    first_steps = [0, *ends[:-1]]
    for number, (first, end) in enumerate(zip(first_steps, ends, strict=True)):
        if first >= end:
            raise DataError(
                f"data.stages.{number} would begin after step {first}, where the run or the stage "
                "has ended; train longer or end the stages before it earlier"
            )
    default = {source.name: source.weight for source in config.train}
    weights = [stage.weights or default for stage in config.stages] or [default]
    knobs = [stage.model for stage in config.stages] or [{}]
    stages = [Stage(*each) for each in zip(first_steps, weights, lengths, knobs, strict=True)]
    return Curriculum(stages, sequences_per_step=sequences_per_step, total_steps=ends[-1])


def _ends(
    config: DataConfig, tokens: Sequence[int], max_steps: int | None, max_tokens: int | None
) -> list[int]:
    """The last step of each stage, that of the run last; `tokens` is what a step of each takes."""
    fractions = [stage.until_fraction for stage in config.stages[:-1]]
    if any(fractions):
        shares = [share for share in fractions if share is not None] + [1.0]
        by_limit = []
        if max_steps is not None:
            by_limit.append(_ends_in_steps(shares, tokens, max_steps))
        if max_tokens is not None:
            by_limit.append(_ends_in_tokens(shares, tokens, max_tokens))
        return min(by_limit, key=lambda ends: ends[-1])
    ends = [stage.until_step or 0 for stage in config.stages[:-1]]
    limits = [] if max_steps is None else [max_steps]
    if max_tokens is not None:
        firsts = [0, *ends]
        before = sum(n * (end - first) for n, first, end in zip(tokens, firsts, ends, strict=False))
        limits.append(firsts[-1] - (before - max_tokens) // tokens[-1])
    return [*ends, min(limits)]


def _ends_in_steps(shares: Sequence[float], tokens: Sequence[int], max_steps: int) -> list[int]:
    """N steps, divided so that a stage with a share f of the tokens gets f / L of them."""
    parts = [
        (share - before) / count
        for share, before, count in zip(shares, [0.0, *shares], tokens, strict=False)
    ]
    cumulative = [math.fsum(parts[: i + 1]) for i in range(len(parts))]
    return [round(max_steps * part / cumulative[-1]) for part in cumulative]


def _ends_in_tokens(shares: Sequence[float], tokens: Sequence[int], max_tokens: int) -> list[int]:
    """Each stage ends with the first step that reaches its share of M tokens."""
    ends, step, done = [], 0, 0
    for share, count in zip(shares, tokens, strict=True):
        steps = max(0, -(-(round(share * max_tokens) - done) // count))
        step, done = step + steps, done + steps * count
        ends.append(step)
    return ends
