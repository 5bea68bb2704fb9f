"""Rolling back after a loss spike: return to a checkpoint and skip the data around the spike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpointing import Checkpoint
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.config.sections import StabilityConfig
from pretrain.distributed.consensus import RankGroup
from pretrain.errors import TrainingError
from pretrain.stability.loss_spikes import SpikeDetector


class Spike(NamedTuple):
    """A loss above the limit of the spike detector."""

    step: int
    loss: float
    limit: float


class Rollback:
    """Detects loss spikes, rolls the run back to the checkpoint before one, and skips data.

    `skipped`: (first, last) step of the data that each rollback skips. Without `config.spike`
    no spike is detected, and only the steps of `config.skip_steps` are skipped.
    """

    def __init__(self, config: StabilityConfig, ranks: RankGroup) -> None:
        self._config, self._ranks = config, ranks
        self._detector = None if config.spike is None else SpikeDetector(config.spike)
        self._pending: list[tuple[int, Tensor]] = []  # losses that are still on the device
        self.skipped: list[tuple[int, int]] = []

    def state_dict(self) -> dict[str, Any]:
        """The skipped steps and the losses of the window, as plain JSON."""
        losses = {"losses": []} if self._detector is None else self._detector.state_dict()
        return {"left_out": self.skipped, **losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; an older checkpoint has none."""
        self.skipped = [(first, last) for first, last in state.get("left_out", [])]
        self._pending = []
        if self._detector is not None:
            self._detector.load_state_dict(state)

    def skips(self, step: int) -> bool:
        """Whether the data of a step are skipped."""
        ranges = [*self._config.skip_steps, *self.skipped]
        return any(first <= step <= last for first, last in ranges)

    def record(self, step: int, loss: Tensor) -> None:
        """Record the loss of a step; `find_spike` reads it from the device."""
        if self._detector is not None:
            self._pending.append((step, loss))

    def find_spike(self) -> Spike | None:
        """The first spike since the last call, as seen by rank 0 (collective)."""
        if (detector := self._detector) is None or not self._pending:
            return None
        pending, self._pending = self._pending, []

        def look() -> Spike | None:
            losses = torch.stack([loss.detach().float().view(()) for _, loss in pending])
            for (step, _), loss in zip(pending, losses.tolist(), strict=True):
                if detector.observe(loss):
                    return Spike(step, loss, detector.limit)
            return None

        return self._ranks.run_on_rank0(look)

    def roll_back(
        self,
        spike: Spike,
        checkpointer: Checkpointer,
        restore: Callable[[Checkpoint], None],
        *,
        step: int,
    ) -> str:
        """Return to the newest checkpoint and skip the data from around `spike` up to `step`.

        `restore` loads a checkpoint into the run, this object included. Returns a message to log.

        Raises:
            TrainingError: there is no checkpoint, or the limit of rollbacks is reached.
        """
        config = self._config.spike
        assert config is not None
        what = (
            f"step {spike.step}: loss {spike.loss:.4g} is above {spike.limit:.4g}, "
            f"{config.sigma:g} standard deviations over the last {config.window} steps"
        )
        skipped = self.skipped  # includes rollbacks later than the checkpoint
        if len(skipped) >= config.max_rollbacks:
            raise TrainingError(
                f"{what}: the run has returned to an earlier step {len(skipped)} times already; "
                "lower training.lr, or raise stability.spike.max_rollbacks"
            )
        checkpoint = checkpointer.find("auto")
        if checkpoint is None:
            raise TrainingError(
                f"{what}, and there is no checkpoint yet to return to; lower checkpoint.interval "
                "or training.lr"
            )
        restore(checkpoint)
        first = max(spike.step - config.skip_before, checkpoint.step + 1)
        self.skipped = [*skipped, (first, step)]
        return (
            f"{what}: back to step {checkpoint.step}; the data of steps {first} to {step} are "
            "skipped"
        )
