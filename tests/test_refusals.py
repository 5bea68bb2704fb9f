"""The assertion about messages fails where one of the four parts is missing."""

from __future__ import annotations

import pytest

from tests.refusals import assert_refused

GOOD = "data.eod=7 has no effect with data.kind=bytes, where 256 ends a document; remove it"
PARTS = {"value": 7, "constraint": ("data.kind=bytes", "256"), "remedy": "remove"}


def test_a_message_with_all_four_parts_passes():
    with assert_refused("data.eod", **PARTS):
        raise ValueError(GOOD)


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        (GOOD.replace("data.eod", "it"), "the setting 'data.eod'"),
        (GOOD.replace("=7", "=70"), "the value 7"),
        (GOOD.replace("256", "something"), "the constraint '256'"),
        (GOOD.replace("data.kind=bytes", "bytes"), "the constraint 'data.kind=bytes'"),
        (GOOD.replace("; remove it", ""), "'remove' .* remedy"),
        ("remove it; " + GOOD.replace("; remove it", "; sorry"), "'remove' .* remedy"),
        (GOOD.replace(" where", "\nwhere"), "where 256"),
        ("", "empty message"),
    ],
)
def test_a_message_without_one_of_them_fails(message, missing):
    with pytest.raises(AssertionError, match=missing), assert_refused("data.eod", **PARTS):
        raise ValueError(message)


def test_a_block_that_raises_nothing_fails():
    with pytest.raises(pytest.fail.Exception), assert_refused("data.eod", **PARTS):
        pass
