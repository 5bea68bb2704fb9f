"""Cases of a test in two tiers: those of `make test`, and those of `make soak` alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def tiered(cases: Iterable[Any], ordinary: Collection[Any]) -> list[Any]:
    """Return the parameters of a test, those that are not `ordinary` marked as slow.

    A case is one value, or a tuple of the values of several parameters.

    Raises:
        AssertionError: an ordinary case is none of the cases.
    """
    listed = list(cases)
    assert all(case in listed for case in ordinary), f"{ordinary} are not all in {listed}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in ordinary else pytest.mark.slow,
        )
        for case in listed
    ]
