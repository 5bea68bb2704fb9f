"""Bounds on the difference of two results that are equal in exact arithmetic.

* The same operations on the same shapes, in the same layout of processes: equal bits
  (`torch.equal`). Kill and resume, the wire, save and load, recomputation, two runs of one layout.
* Anything else (another shape, a transposed operand, a row alone, a joint weight, a chunk, another
  layout): a sum may run in another order, and does on other processors and libraries. Compare in
  fp64 with `FP64`: a real fault is as large as ever there, and rounding is not.
* The precision of training: `rounding(dtype, ...)`, relative to the largest entry of a tensor.

`pytest --reorder-sums` lets every matrix product here sum in an order that depends on its shapes;
a test that needs equal bits where they are not promised fails under it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# About 1e6 units in the last place: far above rounding (1e-13 in the models of these tests), and
# far below the 1e-7 that a single operation in fp32 leaves.
FP64: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def rounding(dtype: torch.dtype, *, depth: int, length: int) -> float:
    """The relative error of `depth` sums of `length` terms, one after the other.

    Each sum is off by at most length * u of its largest term (u = eps / 2: Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., section 3.1), and usually by sqrt(length) * u, since
    errors have either sign (ibid., section 2.8). Errors add up over the depth. Two results are each
    off by that, and 4 standard deviations are allowed: 2 * 4 * depth * sqrt(length) * u.
    """
    return 4 * depth * math.sqrt(length) * torch.finfo(dtype).eps


# Losses of whole runs at two layouts, relative. In fp32: 8 sums of 64 terms, as in a model of four
# layers. In bf16 every sum is taken in fp32 and its result rounded; the mean over tokens keeps less
# than one of these thousands of independent roundings. That is for tensor ranks, which sum
# activations in bf16, for runs against fp32 and for steps after the first, whose weights may be
# rounded otherwise. Data ranks and stages multiply the shapes of one process and sum in fp32: the
# bound of their first step in bf16 is that of fp32 (pretrain/layouts/test_bf16_layouts.py).
FP32_LOSS = rounding(torch.float32, depth=8, length=64)
BF16_LOSS = rounding(torch.bfloat16, depth=1, length=1)
# Norms of gradients have come back through the same layers, from a loss that is off already.
FP32_NORM = 3 * FP32_LOSS
BF16_NORM = 3 * BF16_LOSS


def assert_close(
    found: Tensor, expected: Tensor, bound: float, name: str = "", *, floor: float = 0.0
) -> None:
    """Every entry within `bound` times the largest entry of `expected`, or within `floor`.

    A gradient whose terms cancel is nothing but the rounding of these terms: eps times the norm of
    all gradients is a floor for it.
    """
    assert found.shape == expected.shape, name
    error = (found.double() - expected.double()).abs().max().item()
    allowed = max(bound * expected.abs().max().item(), floor)
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"
