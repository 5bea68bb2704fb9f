"""Finds a loss that stands out from those before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, pstdev

from pretrain.config.sections import SpikeConfig


class SpikeWatch:
    """Looks at the loss of every step: `loss > mean + sigma * deviation` of the `window` before.

    A loss that stands out is not part of what later ones are compared with, nor is one that is not
    finite. Nothing is found before there are `window` losses.
    """

    def __init__(self, config: SpikeConfig, losses: Sequence[float] = ()) -> None:
        self._config = config
        self.losses: deque[float] = deque(losses, maxlen=config.window)

    def stands_out(self, loss: float) -> bool:
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
