"""Which source each sample comes from, and how many samples each source has given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray
from data_tools.errors import DataError

PERIOD = 1 << 16  # proportions are multiples of 1 / PERIOD


class Draws(NamedTuple):
    """Where samples come from."""

    sources: IntArray  # index into Blend.names, [n]
    samples: IntArray  # sample number within that source, [n]


class Blend:
    """A fixed interleaving of K sources in proportion to their weights, looked up in O(1).

    Source k gets n_k of every `PERIOD` samples, n_k = PERIOD * weight_k / sum(weights) rounded so
    that they add up. Its j-th one sits at the j-th of n_k evenly spaced places (2j + 1) / (2 n_k),
    so that after any number of samples no source is more than a few samples off its share.

    A mix can change during a run: a blend begins at run-wide sample `start_sample` and goes on from
    the `base` counts of the blends before it, so that no source repeats or skips a sample.

    Raises:
        DataError: a weight too small to be drawn once in `PERIOD` samples.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        start_sample: int = 0,
        base: Mapping[str, int] | None = None,
    ) -> None:
        self.weights = dict(sorted(weights.items()))  # the order of listing has no effect
        self.names = list(self.weights)
        self.start_sample = start_sample
        self.base = {name: (base or {}).get(name, 0) for name in self.names}
        self._base = np.array([self.base[name] for name in self.names], dtype=np.int64)
        self._counts = _integer_shares(self.weights)
        self._pattern = _spread(self._counts)
        self._ranks = _ranks(self._pattern, len(self.names))

    def draw(self, samples: IntArray) -> Draws:
        """Sources of run-wide sample numbers, all >= `start_sample`."""
        periods = (samples - self.start_sample) // PERIOD
        places = (samples - self.start_sample) % PERIOD
        sources = self._pattern[places].astype(np.int64)
        ranks = self._ranks[places]
        return Draws(sources, self._base[sources] + periods * self._counts[sources] + ranks)

    def ledger(self, consumed_samples: int) -> dict[str, int]:
        """Samples that each source has given once the run has used `consumed_samples`."""
        periods, rest = divmod(consumed_samples - self.start_sample, PERIOD)
        partial = np.bincount(self._pattern[:rest], minlength=len(self.names))
        counts = self._base + periods * self._counts + partial
        return dict(zip(self.names, counts.tolist(), strict=True))


def _integer_shares(weights: Mapping[str, float]) -> IntArray:
    """Largest-remainder rounding of the weights to integers that add up to PERIOD."""
    values = np.array(list(weights.values()), dtype=np.float64)
    exact = PERIOD * values / values.sum()
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: PERIOD - int(counts.sum())]] += 1
    for name, count, share in zip(weights, counts, exact / PERIOD, strict=True):
        if count == 0:
            raise DataError(
                f"data source {name}: weight {weights[name]} is {share:.2e} of the mix, less than "
                f"one sample in {PERIOD}; raise it or leave the source out"
            )
    return counts


def _spread(counts: IntArray) -> npt.NDArray[np.int32]:
    """Source of each place in a period, every source evenly spaced."""
    sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    order = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts])
    return sources[np.argsort(order, kind="stable")]


def _ranks(pattern: npt.NDArray[np.int32], num_sources: int) -> IntArray:
    """How many earlier places of the period have the same source."""
    ranks = np.empty(len(pattern), dtype=np.int64)
    for source in range(num_sources):
        places = np.flatnonzero(pattern == source)
        ranks[places] = np.arange(len(places))
    return ranks
