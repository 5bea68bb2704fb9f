"""Cases of a test in two tiers: those of `make test`, and those of `make soak` alone."""

from __future__ import annotations

import itertools
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


def spread(*values: Iterable[Any]) -> list[Any]:
    """Return every combination of several parameters, tiered; `values` are those of each.

    Ordinary are the first values in turn, each with the next combination of the others: every value
    of the first parameter and every combination of the others is met, not all of both.
    """
    first, *others = map(list, values)
    combinations = list(itertools.product(*others))
    turns = range(max(len(first), len(combinations)))
    ordinary = [(first[i % len(first)], *combinations[i % len(combinations)]) for i in turns]
    return tiered(itertools.product(first, *others), ordinary)
