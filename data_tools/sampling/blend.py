"""Deterministic weighted interleaving of data sources, with a ledger of samples per source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray
from data_tools.errors import DataError

PERIOD = 1 << 16  # proportions are multiples of 1 / PERIOD


class SourceSamples(NamedTuple):
    """Source and sample number within it, for n samples of a blend."""

    sources: IntArray  # index into Blend.names, [n]
    samples: IntArray  # sample number within that source, [n]


class Blend:
    """Fixed interleaving of K sources in proportion to their weights, with O(1) lookup.

    Source k gets n_k of every `PERIOD` samples, n_k = PERIOD * weight_k / sum(weights), rounded so
    that they add up. Its j-th sample takes the j-th of n_k evenly spaced slots (2j + 1) / (2 n_k),
    so that after any number of samples no source is more than a few samples off its share.

    The mix can change during a run: a blend starts at run-wide sample `start_sample` and continues
    from the `base` counts of earlier blends, so that no source repeats or skips a sample.

    Raises:
        DataError: a weight is too small for one sample in `PERIOD`.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        start_sample: int = 0,
        base: Mapping[str, int] | None = None,
    ) -> None:
        self.weights = dict(sorted(weights.items()))  # independent of the listing order
        self.names = list(self.weights)
        self.start_sample = start_sample
        self.base = {name: (base or {}).get(name, 0) for name in self.names}
        self._base = np.array([self.base[name] for name in self.names], dtype=np.int64)
        self._counts = _samples_per_period(self.weights)
        self._pattern = _interleave(self._counts)
        self._occurrences = _occurrences(self._pattern, len(self.names))

    def look_up(self, samples: IntArray) -> SourceSamples:
        """Return sources and their sample numbers for run-wide samples, all >= `start_sample`."""
        periods = (samples - self.start_sample) // PERIOD
        slots = (samples - self.start_sample) % PERIOD
        sources = self._pattern[slots].astype(np.int64)
        within_period = self._occurrences[slots]
        return SourceSamples(
            sources, self._base[sources] + periods * self._counts[sources] + within_period
        )

    def ledger(self, consumed_samples: int) -> dict[str, int]:
        """Return the samples taken from each source after `consumed_samples` run-wide samples."""
        periods, rest = divmod(consumed_samples - self.start_sample, PERIOD)
        partial = np.bincount(self._pattern[:rest], minlength=len(self.names))
        counts = self._base + periods * self._counts + partial
        return dict(zip(self.names, counts.tolist(), strict=True))


def _samples_per_period(weights: Mapping[str, float]) -> IntArray:
    """Round the weights to integers that add up to PERIOD, by the largest-remainder method."""
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


def _interleave(counts: IntArray) -> npt.NDArray[np.int32]:
    """Return the source of each slot of a period, with every source evenly spaced."""
    sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    order = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts])
    return sources[np.argsort(order, kind="stable")]


def _occurrences(pattern: npt.NDArray[np.int32], num_sources: int) -> IntArray:
    """Count, for each slot, the earlier slots of the period with the same source."""
    occurrences = np.empty(len(pattern), dtype=np.int64)
    for source in range(num_sources):
        slots = np.flatnonzero(pattern == source)
        occurrences[slots] = np.arange(len(slots))
    return occurrences
