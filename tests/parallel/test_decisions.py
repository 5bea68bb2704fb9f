"""Decisions are observed and replaced; the error that explains another is the least one."""

from __future__ import annotations

import math

import pytest
import torch

from parallel.decisions import error_of_largest, error_of_threshold, observed, observed_decisions
from parallel.recompute import replay_decision

SCORES = torch.tensor([[4.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
SCALE = math.sqrt(30 / 4)


def mask(*chosen: int) -> torch.Tensor:
    return torch.tensor([[n in chosen for n in range(4)]])


@pytest.mark.parametrize(
    ("chosen", "error"), [((0, 2), 0.0), ((0, 3), 0.5), ((3, 2), 1.0), ((1, 3), 1.5), ((), 0.0)]
)
def test_the_largest_are_explained_by_half_of_the_distance(chosen, error):
    found = error_of_largest(SCORES, mask(*chosen), dim=1)
    assert (float(found.error), float(found.scale)) == (error, pytest.approx(SCALE))


def test_forced_choices_are_exact():
    scores = torch.tensor([[math.inf, 1.0, math.inf, 2.0]], dtype=torch.float64)
    assert error_of_largest(scores, mask(0), dim=1).error == 0  # as many as there is room for
    assert error_of_largest(scores, mask(0, 3), dim=1).error == math.inf
    assert error_of_largest(scores, mask(0, 2), dim=1).error == 0


@pytest.mark.parametrize(
    ("chosen", "room", "error"),
    [
        ((0, 2), None, 0.0),
        ((0, 2, 3), None, 0.5),
        ((0,), None, 0.5),
        ((0,), 1, 0.0),  # both are above, and the larger one is taken
        ((2,), 1, 0.5),
        ((2,), 2, 1.5),
    ],
)
def test_a_threshold_is_explained_by_the_distance_to_it(chosen, room, error):
    found = error_of_threshold(SCORES, 2.5, mask(*chosen), room=room)
    assert float(found.error) == error


def test_an_observer_sees_a_decision_and_may_replace_it():
    def decide() -> torch.Tensor:
        return observed(SCORES > 2.5, lambda other: error_of_threshold(SCORES, 2.5, other))

    seen = []

    def observer(decision, error_for):
        seen.append((decision, float(error_for(mask(0)).error)))
        return mask(0)

    with observed_decisions(observer):
        assert torch.equal(decide(), mask(0))
        assert torch.equal(replay_decision(decide, None), mask(0))
    assert torch.equal(decide(), mask(0, 2))
    assert [error for _, error in seen] == [0.5, 0.5]
