"""Curriculum of a run: number of steps, and the mix, sequence length and batch size of each.

Notation: N steps, M tokens of a run, G sequences per step (all ranks), L sequence length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_tools.config import DataConfig, StageConfig
from data_tools.errors import DataError
from data_tools.sampling.mix import MixSetting


class Position(NamedTuple):
    """Progress of a run: steps, and samples and tokens consumed by all ranks together."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0


START = Position()


class BatchStep(NamedTuple):
    """One level of a batch-size ramp: G = `sequences_per_step` until M = `until_tokens`."""

    until_tokens: int
    sequences_per_step: int


class Stage(NamedTuple):
    """Steps (`first_step`, end] of a run with constant settings; end: the next `first_step`."""

    first_step: int  # steps before the stage
    weights: Mapping[str, float]
    sequence_length: int
    model: Mapping[str, Any]
    sequences_per_step: int


class Curriculum:
    """Stages of one run from `start` on; a run without a curriculum has one stage."""

    def __init__(
        self, stages: Sequence[Stage], *, total_steps: int, start: Position = START
    ) -> None:
        self.stages = tuple(stages)
        self.total_steps = total_steps
        self.start = start
        self._first_steps = [stage.first_step for stage in self.stages]
        self._stage_starts = [start]
        for stage, end in zip(self.stages, self._first_steps[1:], strict=False):
            self._stage_starts.append(_advance(self._stage_starts[-1], stage, end))
        self._first_samples = [position.samples for position in self._stage_starts]
        self._ends = [*self._first_steps[1:], total_steps]

    def stage_after(self, steps: int) -> Stage:
        """Return the stage of the step after the first `steps` steps, `steps >= start.steps`."""
        return self.stages[self._index(steps)]

    def end_after(self, steps: int) -> int:
        """Return the last step of the stage of the step after the first `steps` steps."""
        return self._ends[self._index(steps)]

    def position_after(self, steps: int) -> Position:
        """Return the position after the first `steps` steps, `steps >= start.steps`."""
        index = self._index(steps)
        return _advance(self._stage_starts[index], self.stages[index], steps)

    def tokens_after(self, steps: int) -> int:
        """Return the tokens consumed by the first `steps` steps."""
        return self.position_after(steps).tokens

    def step_of(self, sample: int) -> int:
        """Return the number of the step that takes a sample of the run, from `start` on."""
        if sample < self.start.samples:
            raise ValueError(
                f"sample {sample} is before the plan, which begins at {self.start.samples}"
            )
        index = bisect_right(self._first_samples, sample) - 1
        stage, first = self.stages[index], self._first_samples[index]
        return stage.first_step + (sample - first) // stage.sequences_per_step + 1

    def samples_in_whole_steps(self, first_sample: int, samples: int) -> int:
        """Round `samples` down to whole steps, counted from `first_sample`."""
        index = bisect_right(self._first_samples, samples) - 1
        begin = max(first_sample, self._first_samples[index])
        size = self.stages[index].sequences_per_step
        return begin + (samples - begin) // size * size

    def mix_schedule(self) -> list[MixSetting]:
        """Return the mix and sequence length of each stage, for the loader."""
        return [
            MixSetting(first, stage.weights, stage.sequence_length)
            for first, stage in zip(self._first_samples, self.stages, strict=True)
        ]

    def check_step_alignment(self, first_sample: int) -> None:
        """Check that whole steps counted from `first_sample` end where the next stage starts.

        Raises:
            DataError: a stage would start inside a step.
        """
        index = max(bisect_right(self._first_samples, first_sample) - 1, 0)
        size = self.stages[index].sequences_per_step
        for begin in self._first_samples[index + 1 : index + 2]:
            if (begin - max(first_sample, self._first_samples[index])) % size:
                raise DataError(
                    f"a stage begins at sample {begin}, inside a step: steps of {size} samples "
                    f"continue from {first_sample}; plan the run from there on"
                )

    def describe(self, *, after: int = 0) -> str:
        """Return one line per stage that has steps after step `after`: these steps, tokens per step
        and mix."""
        return "\n".join(
            f"steps {max(stage.first_step, after) + 1:,} to {end:,}: "
            f"{stage.sequences_per_step * stage.sequence_length:,} tokens a step, "
            f"{stage.sequences_per_step:,} x {stage.sequence_length:,}, {_shares(stage.weights)}"
            for stage, end in zip(self.stages, self._ends, strict=True)
            if end > after
        )

    def _index(self, steps: int) -> int:
        if steps < self.start.steps:
            raise ValueError(f"step {steps} is before the plan, which begins at {self.start.steps}")
        return bisect_right(self._first_steps, steps) - 1


def _advance(begin: Position, stage: Stage, steps: int) -> Position:
    """Return the position after `steps` steps of a run; those since `begin` lie in `stage`."""
    samples = (steps - stage.first_step) * stage.sequences_per_step
    return Position(steps, begin.samples + samples, begin.tokens + samples * stage.sequence_length)


def _shares(weights: Mapping[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.1%}" for name, weight in weights.items())


class _StageEnd(NamedTuple):
    """End of a stage: the first step that reaches `step` or `tokens`."""

    step: int | None = None
    tokens: int | None = None

    def steps_from(self, position: Position, tokens_per_step: int) -> int:
        """Return the steps from `position` to the end; negative if it is over a step behind."""
        steps = [] if self.step is None else [self.step - position.steps]
        if self.tokens is not None:
            steps.append(-((position.tokens - self.tokens) // tokens_per_step))
        return min(steps)


class _ConfiguredStage(NamedTuple):
    """A stage of the configuration with its end."""

    number: int
    end: _StageEnd
    sequence_length: int
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
    """Lay out the stages over a run of `max_steps` steps or `max_tokens` tokens, whichever is less.

    A run limited by `max_tokens` ends with the first step that reaches it; the same holds for a
    stage that ends at a fraction of it and for each level of the batch-size `ramp`. A run that
    continues from `start` counts what it has consumed and plans the rest; if nothing is left,
    `total_steps` is at most `start.steps`.

    Raises:
        DataError: a stage gets no step, or its end cannot be determined.
    """
    _check_fractions(config, ramp, max_steps)
    default = {source.name: source.weight for source in config.train}
    stages = config.stages or (StageConfig(),)
    lengths = [stage.sequence_length or config.sequence_length for stage in stages]
    batches = [*ramp, BatchStep(0, sequences_per_step)]
    plans = [
        _lay_out(
            [
                _ConfiguredStage(number, end, length, stage.weights or default, stage.model)
                for number, (end, length, stage) in enumerate(
                    zip(ends, lengths, stages, strict=True)
                )
            ],
            batches,
            start,
        )
        for ends in _stage_ends(config, lengths, max_steps, max_tokens)
    ]
    return min(plans, key=lambda plan: plan.total_steps)


def _lay_out(
    configured: Sequence[_ConfiguredStage], batches: Sequence[BatchStep], start: Position
) -> Curriculum:
    position = start
    stages: list[Stage] = []
    for each in configured:
        is_last, is_resumed = each is configured[-1], position == start and start.steps > 0
        if each.end.steps_from(position, each.sequence_length) <= 0:
            if is_resumed and not is_last:
                continue  # ended before the resumed run starts
            if not is_resumed:
                raise DataError(
                    f"data.stages.{each.number} would begin after step {position.steps}, where the "
                    "run or the stage has ended; train longer or end the earlier stages sooner"
                )
        for stage, end in _split_by_batch_size(each, batches, position):
            stages.append(stage)
            position = end
    return Curriculum(stages, total_steps=position.steps, start=start)


def _split_by_batch_size(
    configured: _ConfiguredStage, batches: Sequence[BatchStep], position: Position
) -> Iterator[tuple[Stage, Position]]:
    """Yield a stage and its end position for each batch size used in a configured stage."""
    length = configured.sequence_length
    *ramp, full = batches
    for batch in [*(each for each in ramp if each.until_tokens > position.tokens), full]:
        stage = Stage(
            position.steps,
            configured.weights,
            length,
            configured.model,
            batch.sequences_per_step,
        )
        tokens = batch.sequences_per_step * length
        steps = left = configured.end.steps_from(position, tokens)
        if batch is not full and left > 0:
            at_this_size = _StageEnd(tokens=batch.until_tokens).steps_from(position, tokens)
            if at_this_size <= 0:
                continue  # the previous step has already consumed its tokens
            steps = min(left, at_this_size)
        position = _advance(position, stage, position.steps + steps)
        yield stage, position
        if steps == left:
            return


def _check_fractions(config: DataConfig, ramp: Sequence[BatchStep], max_steps: int | None) -> None:
    """Refuse fractions of `max_steps` with a ramp, where a share of steps is no share of tokens."""
    fractions = [stage.until_fraction for stage in config.stages]
    if ramp and max_steps is not None and any(fractions):
        raise DataError(
            f"data.stages with until_fraction, training.batch_ramp and training.max_steps="
            f"{max_steps}: shares of the run's tokens cannot be converted to steps; set "
            "training.max_tokens instead of max_steps, or until_step in the stages"
        )


def _stage_ends(
    config: DataConfig, lengths: Sequence[int], max_steps: int | None, max_tokens: int | None
) -> list[list[_StageEnd]]:
    """Return the end of each stage, the run's end last; two lists for fractions of two limits."""
    shares = [stage.until_fraction for stage in config.stages[:-1]]
    fractions = [share for share in shares if share is not None]
    if not fractions:
        ends = [_StageEnd(step=stage.until_step) for stage in config.stages[:-1]]
        return [[*ends, _StageEnd(max_steps, max_tokens)]]
    plans = []
    if max_steps is not None:
        plans.append(
            [_StageEnd(step=end) for end in _ends_in_steps([*fractions, 1.0], lengths, max_steps)]
        )
    if max_tokens is not None:
        ends = [_StageEnd(tokens=round(share * max_tokens)) for share in fractions]
        plans.append([*ends, _StageEnd(tokens=max_tokens)])
    return plans


def _ends_in_steps(shares: Sequence[float], lengths: Sequence[int], max_steps: int) -> list[int]:
    """Divide N steps among the stages in proportion to f / L, for a stage's share f of tokens."""
    parts = [
        (share - before) / length
        for share, before, length in zip(shares, [0.0, *shares], lengths, strict=False)
    ]
    cumulative = [math.fsum(parts[: i + 1]) for i in range(len(parts))]
    return [round(max_steps * part / cumulative[-1]) for part in cumulative]
