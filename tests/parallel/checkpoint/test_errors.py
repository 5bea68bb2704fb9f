"""Messages of our own errors stand alone; those of others name their type."""

from __future__ import annotations

import dataclasses

import pytest

from models.common.attention import check_heads
from parallel.checkpoint.errors import CheckpointError, one_line
from parallel.context import ParallelContext


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    "error", [ValueError("bad\nnumber"), KeyError("name"), FileNotFoundError(2, "gone")]
)
def test_an_error_of_others_is_named_by_its_type(error: Exception) -> None:
    line = one_line(_raised(error))
    assert line.startswith(f"{type(error).__name__}: ")
    assert "\n" not in line


def test_an_error_of_ours_is_its_message_alone() -> None:
    ctx = ParallelContext.single()
    ctx = dataclasses.replace(ctx, tensor=ctx.tensor._replace(size=2))
    with pytest.raises(ValueError) as refused:
        check_heads(ctx, num_heads=3)
    assert type(refused.value) is ValueError
    assert one_line(refused.value) == str(refused.value)
    assert one_line(CheckpointError("step_1 is gone")) == "step_1 is gone"


def test_an_error_of_a_function_in_c_is_not_ours() -> None:
    module = {"__name__": "models.some_module"}
    exec("def number_in(text): return int(text)", module)
    with pytest.raises(ValueError) as found:
        module["number_in"]("x")
    assert one_line(found.value) == f"ValueError: {found.value}"
