"""Initial weights that depend on the depth of a model."""

from __future__ import annotations

import math

from parallel.sharding import Normal


def residual_output(std: float, *, num_layers: int) -> Normal:
    """`N(0, (std / sqrt(2 L))^2)` for projections that add to the residual stream.

    A block adds twice, so the variance of the stream does not grow with depth. Source: GPT-2.
    """
    return Normal(std / math.sqrt(2 * num_layers))
