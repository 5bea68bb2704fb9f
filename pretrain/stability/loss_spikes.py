"""Detection of loss spikes: losses far above those of the steps before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

from pretrain.config.sections import SpikeConfig


class SpikeDetector:
    """Tests every loss: a spike is `loss > mean + sigma * deviation` of the `window` before it.

    Spikes and non-finite losses do not enter the window. No spike is found before the window is
    full.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self.losses: deque[float] = deque(maxlen=config.window)

    def state_dict(self) -> dict[str, Any]:
        """The losses of the window, as plain JSON."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the window; empty where an older checkpoint has none."""
        self.losses = deque(state.get("losses", ()), maxlen=self._config.window)

    def observe(self, loss: float) -> bool:
        """Return whether the loss of the next step is a spike; add it to the window if not."""
        if not math.isfinite(loss):
            return False
        if len(self.losses) == self._config.window and loss > self.limit:
            return True
        self.losses.append(loss)
        return False

    @property
    def limit(self) -> float:
        return fmean(self.losses) + self._config.sigma * pstdev(self.losses)
