"""Error bounds of a parallel run against the run in one process.

fp32: the two differ by the order of sums alone. A gradient may be off by `FP32` of its largest
entry; one that is smaller than `FLOOR` of the norm of all gradients is measured against that, since
what cancels leaves the rounding of its terms.

bf16: every activation is rounded to 8 bits, one process in fp64 rounds none. A rounding is off by
at most u = 2^-8 of the value, by u / sqrt(3) in the mean square, and n of them in a row, which have
either sign, by sqrt(n / 3) u (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
sections 2.8 and 3.1). Four times that is allowed. How many follow one another is counted while the
model runs (`truth/roundings.py`): twice as many again in backward. Errors are relative to the norm
of a tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FP32 = 1e-5
FLOOR = 1e-2
_U_BF16 = 2.0**-8


class Bound(NamedTuple):
    """A bound on a relative error and where it comes from."""

    value: float
    reason: str


EXACT = Bound(0.0, "equal bits: the same draws by name")
SAME_FILES = Bound(0.0, "equal bits: the same operations on the same ranks")
UPDATE = Bound(FP32, "fp32 rounding of the update and of 1e-2 of the weights")
UNTRAINED = Bound(0.0, "equal bits: no step changes them")
ROUNDED = Bound(0.0, "equal bits: the master weights, rounded")
SUMS = Bound(0.75, "two terms of 8 bits: 8 bits hold half of their sums, and those with 0")
COUNTED = Bound(0.0, "counted")


class Bounds(NamedTuple):
    """The bounds of a run in one precision."""

    loss: Bound
    gradient: Bound
    choice: Bound  # of the scores that layers choose by, and of what is learnt from them
    rate: Bound

    @classmethod
    def of(cls, precision: str, *, roundings: int = 0) -> Bounds:
        """`roundings`: in a row in the forward pass of the model; what bounds in bf16 come from."""
        rate = Bound(1e-12, "the same formula in double precision")
        if precision == "fp32":
            order = Bound(FP32, f"order of fp32 sums; |g| above {FLOOR:g} of the norm")
            same = Bound(FP32, "order of fp32 sums")
            return cls(same, order, same, rate)
        gradient, choice = (_after(number) for number in (3 * roundings, roundings))
        loss = Bound(4 * _U_BF16, "4 roundings to 2^-8, averaged over tokens")
        return cls(loss, gradient, choice, rate)


def _after(number: int) -> Bound:
    """The bound after so many roundings in a row."""
    return Bound(
        4 * math.sqrt(number / 3) * _U_BF16, f"4 sqrt({number} / 3) 2^-8, {number} roundings"
    )
