"""Prompts of different length continue in one batch as each of them alone does."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs, logits_of
from models.evaluation import decoding
from models.evaluation.decoding import continue_prompts
from parallel.carry import SequentialModel
from tests.models.evaluation.test_scoring import FAMILIES, double, rows
from tests.refusals import assert_refused

NEW = 6


@torch.no_grad()
def best(of: SequentialModel, prompt: list[int], new: list[int]) -> list[int]:
    """What one plain forward pass over a row alone finds most probable in place of `new`."""
    tokens = torch.tensor([[*prompt, *new]])
    logits = logits_of(of(TokenInputs(tokens)))[len(prompt) - 1 : -1, 0]
    return logits.argmax(dim=-1).tolist()


def prompts() -> list[list[int]]:
    long, other = rows(2, 16).tolist()
    return [long[:7], other, long[:8], other[:12]]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_different_length_continue_as_each_of_them_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 3)
    of = double(name)
    found = continue_prompts(of, prompts(), max_new_tokens=NEW)
    assert [len(row) for row in found] == [NEW] * 4
    assert found == [best(of, *row) for row in zip(prompts(), found, strict=True)]


def test_rows_end_by_themselves() -> None:
    """At an end token, which is left out, or when their text is complete."""
    of = double("llama")
    whole = continue_prompts(of, prompts(), max_new_tokens=NEW)
    end = whole[1][2]
    ended = [row[: row.index(end)] if end in row else row for row in whole]
    assert continue_prompts(of, prompts(), max_new_tokens=NEW, end_ids={end}) == ended
    complete = [row[: row.index(end) + 1] if end in row else row for row in whole]
    found = continue_prompts(
        of, prompts(), max_new_tokens=NEW, is_complete=lambda tokens: tokens[-1] == end
    )
    assert found == complete != whole


def test_sampling_at_the_smallest_share_is_greedy_and_draws_are_of_the_generator() -> None:
    of, given = double("llama"), prompts()
    greedy = continue_prompts(of, given, max_new_tokens=NEW)
    options = {"max_new_tokens": NEW, "temperature": 1.0}
    assert continue_prompts(of, given, **options, top_k=1) == greedy
    drawn = [
        continue_prompts(of, given, **options, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_empty_prompts_are_refused() -> None:
    with assert_refused("prompts", value=0, constraint="1 or more", remedy="give a prompt"):
        continue_prompts(double("llama"), [[1], []], max_new_tokens=3)
