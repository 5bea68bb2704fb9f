"""Rolling back after a loss spike: return to a checkpoint and skip the data around the spike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpointing import Checkpoint
from pretrain.checkpointing.async_save import Saves
from pretrain.config.sections import StabilityConfig
from pretrain.distributed.consensus import Ranks
from pretrain.errors import TrainingError
from pretrain.stability.loss_spikes import SpikeWatch


class Spike(NamedTuple):
    """A loss that stands out, and the limit that it is above."""

    step: int
    loss: float
    limit: float


class Rollback:
    """Finds loss spikes, returns the run to the checkpoint before one, and skips data.

    `left_out`: (first, last) step of the data that each rollback skips. Without `config.spike`
    nothing is looked for, and only the steps of `config.skip_steps` are skipped.
    """

    def __init__(self, config: StabilityConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._watch = None if config.spike is None else SpikeWatch(config.spike)
        self._unread: list[tuple[int, Tensor]] = []  # losses that are still on the device
        self.left_out: list[tuple[int, int]] = []

    def state_dict(self) -> dict[str, Any]:
        """The skipped steps and the losses of the window, as plain JSON."""
        losses = {"losses": []} if self._watch is None else self._watch.state_dict()
        return {"left_out": self.left_out, **losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; an older checkpoint has none."""
        self.left_out = [(first, last) for first, last in state.get("left_out", [])]
        self._unread = []
        if self._watch is not None:
            self._watch.load_state_dict(state)

    def skips(self, step: int) -> bool:
        """Whether the data of a step are skipped."""
        ranges = [*self._config.skip_steps, *self.left_out]
        return any(first <= step <= last for first, last in ranges)

    def record(self, step: int, loss: Tensor) -> None:
        """Note the loss of a step, which `find_spike` reads from the device."""
        if self._watch is not None:
            self._unread.append((step, loss))

    def find_spike(self) -> Spike | None:
        """The first loss since the last call that stands out, as rank 0 sees it (collective)."""
        if (watch := self._watch) is None or not self._unread:
            return None
        unread, self._unread = self._unread, []

        def look() -> Spike | None:
            losses = torch.stack([loss.detach().float().view(()) for _, loss in unread])
            for (step, _), loss in zip(unread, losses.tolist(), strict=True):
                if watch.stands_out(loss):
                    return Spike(step, loss, watch.limit)
            return None

        return self._ranks.on_first(look)

    def roll_back(
        self, spike: Spike, saves: Saves, restore: Callable[[Checkpoint], None], *, step: int
    ) -> str:
        """Return to the newest checkpoint; the data from around `spike` up to `step` are skipped.

        `restore` loads a checkpoint into the run, this object included. Returns a message to log.

        Raises:
            TrainingError: there is no checkpoint, or the run has returned as often as it may.
        """
        config = self._config.spike
        assert config is not None
        what = (
            f"step {spike.step}: loss {spike.loss:.4g} is above {spike.limit:.4g}, "
            f"{config.sigma:g} standard deviations over the last {config.window} steps"
        )
        left_out = self.left_out  # also of rollbacks that the checkpoint is older than
        if len(left_out) >= config.max_rollbacks:
            raise TrainingError(
                f"{what}: the run has returned to an earlier step {len(left_out)} times already; "
                "lower training.lr, or raise stability.spike.max_rollbacks"
            )
        checkpoint = saves.find("auto")
        if checkpoint is None:
            raise TrainingError(
                f"{what}, and there is no checkpoint yet to return to; lower checkpoint.interval "
                "or training.lr"
            )
        restore(checkpoint)
        first = max(spike.step - config.skip_before, checkpoint.step + 1)
        self.left_out = [*left_out, (first, step)]
        return (
            f"{what}: back to step {checkpoint.step}; the data of steps {first} to {step} are left "
            "out"
        )
