"""Two runs of one configuration at two layouts have the same losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.tolerance import FP32_NORM

Records = Sequence[dict[str, Any]]


def assert_equal_runs(
    found: tuple[Records, Records], expected: tuple[Records, Records], terms: Sequence[str]
) -> None:
    """Compare `terms` of every training record, and the held-out loss and bits of the last
    evaluation: (trained, evaluated)."""
    (trained, evaluated), (expected_trained, expected_evaluated) = found, expected
    for term in terms:
        values = [record[term] for record in expected_trained]
        assert [record[term] for record in trained] == pytest.approx(values, rel=FP32_NORM), term
    wanted = {
        name: value
        for name, value in expected_evaluated[-1].items()
        if name == "eval_loss" or name.startswith("bits_")
    }
    found_bits = {name: evaluated[-1][name] for name in wanted}
    assert found_bits == pytest.approx(wanted, rel=FP32_NORM)
