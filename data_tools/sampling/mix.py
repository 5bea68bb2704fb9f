"""Where each sample of a run comes from: the blends of its stages, one after the other.

A position is a place in a source's shuffled order, in tokens: sample j of a source that is read in
sequences of length L starts at position j*L. Lengths may change, positions go on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_tools.sampling.blend import Blend


class Given(NamedTuple):
    """What a source has given to a run.

    `position` is where it goes on, `tokens` what was trained on. They differ where a stage of
    longer sequences could not begin inside one.
    """

    position: int
    tokens: int


class Phase(NamedTuple):
    """A stage as the loader needs it: from which sample on, which mix, which length."""

    first_sample: int
    weights: Mapping[str, float]
    sequence_length: int


class Leg(NamedTuple):
    """Samples in one mix and of one length, from `blend.start_sample` to where the next leg begins.

    `blend` counts samples of `sequence_length`; `given` is the ledger before the leg.
    """

    blend: Blend
    sequence_length: int
    given: Mapping[str, Given]

    def ledger(self, consumed_samples: int) -> dict[str, Given]:
        """The ledger once the run has used so many samples; sources of earlier mixes stay in it."""
        ledger = dict(self.given)
        for name, count in self.blend.ledger(consumed_samples).items():
            before = self.given.get(name, Given(0, 0)).tokens
            new = (count - self.blend.base[name]) * self.sequence_length
            ledger[name] = Given(count * self.sequence_length, before + new)
        return ledger

    def goes_on_in(self, phase: Phase) -> bool:
        """Whether a phase has the same mix and length."""
        same_mix = dict(phase.weights) == self.blend.weights
        return same_mix and phase.sequence_length == self.sequence_length


class Mix:
    """The legs of a run, or of what is left of it after a resume."""

    def __init__(self, legs: Sequence[Leg]) -> None:
        self.legs = tuple(legs)
        self.first_samples = [leg.blend.start_sample for leg in self.legs]

    def leg_of(self, sample: int) -> Leg:
        """The leg of a run-wide sample, which must not lie before the first leg."""
        return self.legs[bisect_right(self.first_samples, sample) - 1]

    def leg_before(self, consumed_samples: int) -> Leg:
        """The leg that gave the last of so many samples."""
        return self.leg_of(max(consumed_samples - 1, self.first_samples[0]))

    def ledger(self, consumed_samples: int) -> dict[str, Given]:
        """What every source has given once the run has used so many samples."""
        return self.leg_before(consumed_samples).ledger(consumed_samples)


def plan_mix(
    phases: Sequence[Phase],
    *,
    consumed_samples: int = 0,
    ledger: Mapping[str, Given] | None = None,
    leg: Leg | None = None,
) -> Mix:
    """The legs from sample `consumed_samples` on, where `ledger` is what the sources have given.

    `leg` is the one in force there. A phase that has the mix and length of what is before it goes
    on with that leg.
    """
    starts = [phase.first_sample for phase in phases]
    legs: list[Leg] = []
    for phase in phases[bisect_right(starts, consumed_samples) - 1 :]:
        begin = max(phase.first_sample, consumed_samples)
        before = legs[-1] if legs else leg
        if before is None or not before.goes_on_in(phase):
            legs.append(_leg(phase, begin, legs[-1].ledger(begin) if legs else ledger or {}))
        elif not legs:
            legs.append(before)
    return Mix(legs)


def _leg(phase: Phase, begin: int, given: Mapping[str, Given]) -> Leg:
    length = phase.sequence_length
    # Rounded up: a longer sequence that begins inside one already read would repeat tokens.
    base = {name: -(-given[name].position // length) for name in phase.weights if name in given}
    return Leg(Blend(phase.weights, start_sample=begin, base=base), length, given)
