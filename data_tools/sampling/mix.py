"""The source mix of a run: one blend per segment, and the progress of each source across segments.

A position is an offset in tokens into a source's shuffled order: sample j of a source that is read
in sequences of length L starts at position j*L. Positions carry over when the length changes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_tools.sampling.blend import Blend


class SourceProgress(NamedTuple):
    """Progress of one source in a run.

    `position` is where reading continues, `tokens` the number of tokens trained on. They differ
    when a segment of longer sequences could not start in the middle of one.
    """

    position: int
    tokens: int


class MixSetting(NamedTuple):
    """Source weights and sequence length from a run-wide sample on; one entry of the schedule."""

    first_sample: int
    weights: Mapping[str, float]
    sequence_length: int


class MixSegment(NamedTuple):
    """Samples with one blend and one sequence length.

    The segment runs from `blend.start_sample` to the start of the next one. `blend` counts samples
    of `sequence_length`; `ledger_before` is the ledger at the start of the segment.
    """

    blend: Blend
    sequence_length: int
    ledger_before: Mapping[str, SourceProgress]

    def ledger(self, consumed_samples: int) -> dict[str, SourceProgress]:
        """Return the ledger after `consumed_samples` samples, including sources no longer used."""
        ledger = dict(self.ledger_before)
        for name, count in self.blend.ledger(consumed_samples).items():
            before = self.ledger_before.get(name, SourceProgress(0, 0)).tokens
            new = (count - self.blend.base[name]) * self.sequence_length
            ledger[name] = SourceProgress(count * self.sequence_length, before + new)
        return ledger

    def matches(self, setting: MixSetting) -> bool:
        """Return whether a setting has the same weights and sequence length."""
        same_mix = dict(setting.weights) == self.blend.weights
        return same_mix and setting.sequence_length == self.sequence_length


class Mix:
    """The segments of a run, or of its remainder after a resume."""

    def __init__(self, segments: Sequence[MixSegment]) -> None:
        self.segments = tuple(segments)
        self.first_samples = [segment.blend.start_sample for segment in self.segments]

    def segment_of(self, sample: int) -> MixSegment:
        """Return the segment of a run-wide sample, which must not precede the first segment."""
        return self.segments[bisect_right(self.first_samples, sample) - 1]

    def segment_before(self, consumed_samples: int) -> MixSegment:
        """Return the segment of the last of the first `consumed_samples` samples."""
        return self.segment_of(max(consumed_samples - 1, self.first_samples[0]))

    def ledger(self, consumed_samples: int) -> dict[str, SourceProgress]:
        """Return the progress of every source after `consumed_samples` samples."""
        return self.segment_before(consumed_samples).ledger(consumed_samples)


def plan_mix(
    schedule: Sequence[MixSetting],
    *,
    consumed_samples: int = 0,
    ledger: Mapping[str, SourceProgress] | None = None,
    current: MixSegment | None = None,
) -> Mix:
    """Build the segments from sample `consumed_samples` on.

    A setting with the weights and length of the segment before it continues that segment.

    Args:
        ledger: Progress of the sources at `consumed_samples`.
        current: The segment in force at `consumed_samples`.
    """
    starts = [setting.first_sample for setting in schedule]
    segments: list[MixSegment] = []
    for setting in schedule[bisect_right(starts, consumed_samples) - 1 :]:
        begin = max(setting.first_sample, consumed_samples)
        before = segments[-1] if segments else current
        if before is None or not before.matches(setting):
            progress = segments[-1].ledger(begin) if segments else ledger or {}
            segments.append(_start_segment(setting, begin, progress))
        elif not segments:
            segments.append(before)
    return Mix(segments)


def _start_segment(
    setting: MixSetting, begin: int, ledger: Mapping[str, SourceProgress]
) -> MixSegment:
    length = setting.sequence_length
    # Round up: a longer sequence that starts inside one already read would repeat tokens.
    base = {name: -(-ledger[name].position // length) for name in setting.weights if name in ledger}
    return MixSegment(Blend(setting.weights, start_sample=begin, base=base), length, ledger)
