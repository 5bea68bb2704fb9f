"""The steps of a run: how many, from which mix, how long their sequences and how many of them.

Letters: N steps, M tokens of a run, G sequences of a step (of all ranks), L the sequence length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_tools.config import DataConfig, StageConfig
from data_tools.errors import DataError
from data_tools.sampling.mix import Phase


class Position(NamedTuple):
    """How far a run has come: what all ranks together have taken, samples and tokens of all."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0


START = Position()


class BatchStep(NamedTuple):
    """A step of a ramp of the batch: G = `sequences_per_step` until M = `until_tokens`."""

    until_tokens: int
    sequences_per_step: int


class Stage(NamedTuple):
    """Steps (`first_step`, end] of a run, in which nothing changes; the end is the `first_step` of
    the next one."""

    first_step: int  # steps taken before it
    weights: Mapping[str, float]
    sequence_length: int
    model: Mapping[str, Any]
    sequences_per_step: int


class Curriculum:
    """The stages of one run from `start` on; a run without a curriculum has one stage."""

    def __init__(
        self, stages: Sequence[Stage], *, total_steps: int, start: Position = START
    ) -> None:
        self.stages = tuple(stages)
        self.total_steps = total_steps
        self.start = start
        self._first_steps = [stage.first_step for stage in self.stages]
        self._begins = [start]
        for stage, end in zip(self.stages, self._first_steps[1:], strict=False):
            self._begins.append(_advance(self._begins[-1], stage, end))
        self._first_samples = [begin.samples for begin in self._begins]

    def stage_after(self, steps: int) -> Stage:
        """The stage of the step that follows the first `steps`, which are at least those of
        `start`."""
        return self.stages[self._index(steps)]

    def position_after(self, steps: int) -> Position:
        """What the first `steps` steps have taken; at least those of `start`."""
        index = self._index(steps)
        return _advance(self._begins[index], self.stages[index], steps)

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps take."""
        return self.position_after(steps).tokens

    def whole_steps(self, first_sample: int, samples: int) -> int:
        """How many of the first `samples` samples lie in whole steps that go on from
        `first_sample`."""
        index = bisect_right(self._first_samples, samples) - 1
        begin = max(first_sample, self._first_samples[index])
        size = self.stages[index].sequences_per_step
        return begin + (samples - begin) // size * size

    def phases(self) -> list[Phase]:
        """The stages as the loader reads them, one for each mix or length or size of steps."""
        return [
            Phase(first, stage.weights, stage.sequence_length)
            for first, stage in zip(self._first_samples, self.stages, strict=True)
        ]

    def check_begin(self, first_sample: int) -> None:
        """Check that whole steps from `first_sample` on end where the next stage begins.

        Raises:
            DataError: a stage would begin inside a step.
        """
        index = max(bisect_right(self._first_samples, first_sample) - 1, 0)
        size = self.stages[index].sequences_per_step
        for begin in self._first_samples[index + 1 : index + 2]:
            if (begin - max(first_sample, self._first_samples[index])) % size:
                raise DataError(
                    f"a stage begins at sample {begin}, inside a step: steps of {size} samples go "
                    f"on from {first_sample}; plan the run from there on"
                )

    def describe(self) -> str:
        """A line for each stage: its steps, tokens and mix."""
        ends = [*self._first_steps[1:], self.total_steps]
        return "\n".join(
            f"steps {stage.first_step + 1:,} to {end:,}: "
            f"{stage.sequences_per_step * stage.sequence_length:,} tokens a step, "
            f"{stage.sequences_per_step:,} x {stage.sequence_length:,}, {_shares(stage.weights)}"
            for stage, end in zip(self.stages, ends, strict=True)
        )

    def _index(self, steps: int) -> int:
        if steps < self.start.steps:
            raise ValueError(f"step {steps} is before the plan, which begins at {self.start.steps}")
        return bisect_right(self._first_steps, steps) - 1


def _advance(begin: Position, stage: Stage, steps: int) -> Position:
    """The position after `steps` steps of a run, those since `begin` of one stage."""
    samples = (steps - stage.first_step) * stage.sequences_per_step
    return Position(steps, begin.samples + samples, begin.tokens + samples * stage.sequence_length)


def _shares(weights: Mapping[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.1%}" for name, weight in weights.items())


class _End(NamedTuple):
    """A stage ends with the first step that reaches one of the two."""

    step: int | None = None
    tokens: int | None = None

    def steps_from(self, position: Position, tokens_per_step: int) -> int:
        """Steps up to the end, negative where it lies more than a step behind."""
        steps = [] if self.step is None else [self.step - position.steps]
        if self.tokens is not None:
            steps.append(-((position.tokens - self.tokens) // tokens_per_step))
        return min(steps)


class _Part(NamedTuple):
    """A stage of the configuration with its end; `size`: tokens of a sequence."""

    number: int
    end: _End
    size: int
    weights: Mapping[str, float]
    model: Mapping[str, Any]


def plan_curriculum(
    config: DataConfig,
    *,
    sequences_per_step: int,
    max_steps: int | None,
    max_tokens: int | None,
    ramp: Sequence[BatchStep] = (),
    start: Position = START,
) -> Curriculum:
    """Lay the stages out over a run of `max_steps` steps or `max_tokens` tokens, what is shorter.

    A run that `max_tokens` ends takes the first step that reaches it, and so does a stage that
    ends at a fraction of it, and each step of the `ramp` of the batch. A run that goes on from
    `start` counts what it has taken and plans what is left; where nothing is, `total_steps` is at
    most `start.steps`.

    Raises:
        DataError: a stage gets no step, or where it ends cannot be known.
    """
    _check_fractions(config, ramp, max_steps)
    default = {source.name: source.weight for source in config.train}
    stages = config.stages or (StageConfig(),)
    lengths = [stage.sequence_length or config.sequence_length for stage in stages]
    batches = [*ramp, BatchStep(0, sequences_per_step)]
    plans = [
        _lay_out(
            [
                _Part(number, end, length, stage.weights or default, stage.model)
                for number, (end, length, stage) in enumerate(
                    zip(ends, lengths, stages, strict=True)
                )
            ],
            batches,
            start,
        )
        for ends in _ends(config, lengths, max_steps, max_tokens)
    ]
    return min(plans, key=lambda plan: plan.total_steps)


def _lay_out(parts: Sequence[_Part], batches: Sequence[BatchStep], start: Position) -> Curriculum:
    position = start
    stages: list[Stage] = []
    for part in parts:
        is_last, goes_on = part is parts[-1], position == start and start.steps > 0
        if part.end.steps_from(position, part.size) <= 0:
            if goes_on and not is_last:
                continue  # over before this run goes on
            if not goes_on:
                raise DataError(
                    f"data.stages.{part.number} would begin after step {position.steps}, where the "
                    "run or the stage has ended; train longer or end the stages before it earlier"
                )
        for stage, end in _stages(part, batches, position):
            stages.append(stage)
            position = end
    return Curriculum(stages, total_steps=position.steps, start=start)


def _stages(
    part: _Part, batches: Sequence[BatchStep], position: Position
) -> Iterator[tuple[Stage, Position]]:
    """A stage for each size of step up to the end of a part, and where it ends."""
    *ramp, full = batches
    for batch in [*(each for each in ramp if each.until_tokens > position.tokens), full]:
        stage = Stage(position.steps, part.weights, part.size, part.model, batch.sequences_per_step)
        tokens = batch.sequences_per_step * part.size
        steps = left = part.end.steps_from(position, tokens)
        if batch is not full and left > 0:
            of_size = _End(tokens=batch.until_tokens).steps_from(position, tokens)
            if of_size <= 0:
                continue  # the step before has taken its tokens, too
            steps = min(left, of_size)
        position = _advance(position, stage, position.steps + steps)
        yield stage, position
        if steps == left:
            return


def _check_fractions(config: DataConfig, ramp: Sequence[BatchStep], max_steps: int | None) -> None:
    """With steps of several sizes a share of the steps is no share of the tokens."""
    fractions = [stage.until_fraction for stage in config.stages]
    if ramp and max_steps is not None and any(fractions):
        raise DataError(
            f"data.stages with until_fraction, training.batch_ramp and training.max_steps="
            f"{max_steps}: shares of the run's tokens are not known in steps; set "
            "training.max_tokens in place of max_steps, or until_step in the stages"
        )


def _ends(
    config: DataConfig, lengths: Sequence[int], max_steps: int | None, max_tokens: int | None
) -> list[list[_End]]:
    """Where each stage ends, that of the run last; fractions of two limits give two plans."""
    shares = [stage.until_fraction for stage in config.stages[:-1]]
    fractions = [share for share in shares if share is not None]
    if not fractions:
        ends = [_End(step=stage.until_step) for stage in config.stages[:-1]]
        return [[*ends, _End(max_steps, max_tokens)]]
    plans = []
    if max_steps is not None:
        plans.append(
            [_End(step=end) for end in _ends_in_steps([*fractions, 1.0], lengths, max_steps)]
        )
    if max_tokens is not None:
        ends = [_End(tokens=round(share * max_tokens)) for share in fractions]
        plans.append([*ends, _End(tokens=max_tokens)])
    return plans


def _ends_in_steps(shares: Sequence[float], lengths: Sequence[int], max_steps: int) -> list[int]:
    """N steps, divided so that a stage with a share f of the tokens gets f / L of them."""
    parts = [
        (share - before) / length
        for share, before, length in zip(shares, [0.0, *shares], lengths, strict=False)
    ]
    cumulative = [math.fsum(parts[: i + 1]) for i in range(len(parts))]
    return [round(max_steps * part / cumulative[-1]) for part in cumulative]
