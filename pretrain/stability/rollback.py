"""Rolling back after a loss spike: return to a checkpoint that was saved before the data around the
spike were read, and skip these data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.sampling.curriculum import Curriculum
from parallel.checkpoint.rollback_record import SkippedData
from pretrain.checkpointing import Checkpoint
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.checkpointing.train_state import TrainState
from pretrain.config.resume_rules import change_of
from pretrain.config.sections import SpikeConfig, StabilityConfig
from pretrain.distributed.consensus import RankGroup
from pretrain.errors import TrainingError
from pretrain.stability.loss_spikes import SpikeDetector


class Spike(NamedTuple):
    """A loss above the limit of the spike detector."""

    step: int
    loss: float
    limit: float


class Rollback:
    """Detects loss spikes, rolls the run back to a checkpoint before one, and skips data.

    `skipped`: by each rollback of the run. Without `config.spike` no spike is detected, and only
    the steps of `config.skip_steps`, and what earlier rollbacks skip, are skipped.
    """

    def __init__(self, config: StabilityConfig, state: TrainState, ranks: RankGroup) -> None:
        self._config, self._state, self._ranks = config, state, ranks
        self._detector = None if config.spike is None else SpikeDetector(config.spike)
        self.skipped: list[SkippedData] = []

    def state_dict(self) -> dict[str, Any]:
        """The skipped data and the losses of the window, as plain JSON."""
        losses = {"losses": []} if self._detector is None else self._detector.state_dict()
        return {
            "left_out": [each.steps for each in self.skipped],
            "left_out_samples": [each.samples for each in self.skipped],
            **losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; an older checkpoint has none."""
        steps = state.get("left_out", [])
        samples = state.get("left_out_samples", [None] * len(steps))
        self.skipped = [
            SkippedData(steps=tuple(each), samples=None if of is None else tuple(of))
            for each, of in zip(steps, samples, strict=True)
        ]
        if self._detector is not None:
            self._detector.load_state_dict(state)

    def remember(self, skipped: Sequence[SkippedData]) -> None:
        """Also skip what rollbacks skip that a restored checkpoint does not know of."""
        self.skipped += [each for each in skipped if each not in self.skipped]

    @property
    def skipped_steps(self) -> list[tuple[int, int]]:
        """[first, last] steps whose data are skipped, as the run counts them now."""
        plan = self._state.curriculum
        return [*self._config.skip_steps, *(steps_of(each, plan) for each in self.skipped)]

    def find_spike(self, losses: Mapping[int, Tensor]) -> Spike | None:
        """The first spike among the losses of the steps since the last call, by step, as seen by
        rank 0 (collective). They are read from the device here."""
        if (detector := self._detector) is None or not losses:
            return None

        def look() -> Spike | None:
            numbers = torch.stack([loss.detach().float().view(()) for loss in losses.values()])
            for step, loss in zip(losses, numbers.tolist(), strict=True):
                if detector.observe(loss):
                    return Spike(step, loss, detector.limit)
            return None

        return self._ranks.run_on_rank0(look)

    def roll_back(
        self, spike: Spike, checkpointer: Checkpointer, restore: Callable[[Checkpoint], None]
    ) -> str:
        """Return to before the data around `spike`, and skip them up to the last step (collective).

        The run returns to the newest checkpoint that holds none of them, or where there is none to
        the oldest before the spike, which holds the fewest; later checkpoints are deleted.
        `restore` loads a checkpoint into the run, this object included. Returns a message to log.

        Raises:
            TrainingError: there is no checkpoint, or the limit of rollbacks is reached.
            CheckpointError, AgreedError: the run cannot return; the next start may.
        """
        config = self._config.spike
        assert config is not None
        what = (
            f"step {spike.step}: loss {spike.loss:.4g} is above {spike.limit:.4g}, "
            f"{config.sigma:g} standard deviations over the last {config.window} steps"
        )
        if len(self.skipped) >= config.max_rollbacks:
            raise TrainingError(
                f"{what}: the run has returned to an earlier step {len(self.skipped)} times "
                "already; lower training.lr, or raise stability.spike.max_rollbacks"
            )
        order = partial(_by_fitness, spike=spike, skip_before=config.skip_before)
        checkpoint = checkpointer.find("auto", order=order)
        if checkpoint is None:
            raise TrainingError(
                f"{what}, and there is no checkpoint yet to return to; lower checkpoint.interval "
                "or training.lr"
            )
        held = self._held(spike, config, checkpoint)
        new = self._ranks.run_on_all_ranks(lambda: self._to_skip(spike, config, checkpoint))
        restore(checkpointer.return_to(checkpoint, [*self.skipped, new]))
        first, last = steps_of(new, self._state.curriculum)
        message = f"{what}: back to step {checkpoint.step}"
        if held:
            message += (
                f", the oldest checkpoint, which holds {len(held)} of the steps to be skipped "
                f"({held[0]} to {held[-1]})"
            )
        message += f"; the data of steps {first} to {last} are skipped"
        if changed := _changed_order(checkpoint):
            message += (
                f"; {' and '.join(changed)} changed after step {checkpoint.step}, so these are "
                "other data than those around the spike"
            )
        return message

    def _held(self, spike: Spike, config: SpikeConfig, checkpoint: Checkpoint) -> list[int]:
        """Steps of `checkpoint` that should be skipped, and that it has not skipped."""
        plan = self._state.curriculum
        skipped = [steps_of(each, plan) for each in self.skipped]
        first = max(spike.step - config.skip_before, 1)
        return [
            step
            for step in range(first, checkpoint.step + 1)
            if not any(begin <= step <= end for begin, end in skipped)
        ]

    def _to_skip(self, spike: Spike, config: SpikeConfig, checkpoint: Checkpoint) -> SkippedData:
        """The data from `skip_before` steps before the spike, as far as they are after
        `checkpoint`, up to the last step."""
        taken, again = self._state.curriculum, self._state.plan_from(checkpoint.trainer)
        first, last = max(spike.step - config.skip_before, checkpoint.step + 1), self._state.step
        start = taken.start
        if first > start.steps:
            begin = taken.position_after(first - 1).samples
        elif again.position_after(start.steps).samples == start.samples:
            begin = again.position_after(first - 1).samples  # no other batch since the checkpoint
        else:  # taken in an earlier start with another batch: rather skip too much
            first, begin = again.start.steps + 1, again.start.samples
        return SkippedData(steps=(first, last), samples=(begin, taken.position_after(last).samples))


def steps_of(skipped: SkippedData, plan: Curriculum) -> tuple[int, int]:
    """The [first, last] steps of a plan that hold any of the samples.

    Those before its start keep their numbers, and so do all where the samples are not known.
    """
    first, last = skipped.steps
    if skipped.samples is not None:
        begin, end = skipped.samples
        if begin >= plan.start.samples:
            first = plan.step_of(begin)
        if end > plan.start.samples:
            last = plan.step_of(end - 1)
    return first, last


def _by_fitness(steps: list[int], *, spike: Spike, skip_before: int) -> list[int]:
    """Checkpoints before a spike: the newest without the data around it first, then, from the
    oldest on, those with some of them. `steps`: newest first."""
    before = [step for step in steps if step < spike.step]
    clean = [step for step in before if step < spike.step - skip_before]
    return clean + before[: len(before) - len(clean)][::-1]


def _changed_order(checkpoint: Checkpoint) -> list[str]:
    """The settings that decide which data a sample is, and have changed since `checkpoint`."""
    keys = [each.key for each in checkpoint.differences if each.key.startswith("data.")]
    return sorted({".".join(k.split(".")[:2]) for k in keys if change_of(k) == "training"})
