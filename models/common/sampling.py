"""Settings of sampling that every family's generation shares."""

from __future__ import annotations

from numbers import Integral


def check_sampling(
    temperature: float, *, top_k: int | None = None, top_p: float | None = None
) -> None:
    """Raises ValueError: a setting is out of its range."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature={temperature} must be finite and not negative; use 0 for the most "
            "probable token"
        )
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(
            f"top_k={top_k} must be a whole number of 1 or more; leave it at None to keep every "
            "token"
        )
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(
            f"top_p={top_p} must be above 0 and at most 1; leave it at None to keep every token"
        )


def check_seed(seed: int) -> None:
    """Raises ValueError: torch has no such seed."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed {seed} must be from -2**63 to 2**64 - 1; choose a smaller one")
