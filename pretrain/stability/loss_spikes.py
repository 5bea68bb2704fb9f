"""Detection of loss spikes: losses that stand out from those before them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

from pretrain.config.sections import SpikeConfig


class SpikeDetector:
    """Looks at the loss of every step: `loss > mean + sigma * deviation` of the `window` before.

    A loss that stands out is not part of what later ones are compared with, nor is one that is not
    finite. Nothing is found before there are `window` losses.
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

    def is_spike(self, loss: float) -> bool:
        """Look at the loss of the next step."""
        if not math.isfinite(loss):
            return False
        if len(self.losses) == self._config.window and loss > self.limit:
            return True
        self.losses.append(loss)
        return False

    @property
    def limit(self) -> float:
        return fmean(self.losses) + self._config.sigma * pstdev(self.losses)
