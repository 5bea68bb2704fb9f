"""Choices of ranks and micro-batches are put together, and wrong ones are not explained."""

from __future__ import annotations

import math

import pytest
import torch

from parallel.decisions import error_of_largest, observed, observed_decisions
from pretrain.prove.bounds import Bounds
from pretrain.prove.choices import Choices, Given, Giver, read_choices, recorded

SCORES = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BOUNDS = {name: Bounds.of(name, roundings=54).choice.value for name in ("fp32", "bf16")}


def largest(scores: torch.Tensor) -> torch.Tensor:
    """The three largest of every row [b, s]."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :3], True)


def decide(scores: torch.Tensor) -> torch.Tensor:
    return observed(largest(scores), lambda other: error_of_largest(scores, other, dim=1))


def given(parts: list[list[torch.Tensor]]) -> float:
    """The error that explains what was chosen in parts, by tensor rank and micro-batch."""
    giver = Giver([Choices([[[part] for part in of_rank] for of_rank in parts])])
    with observed_decisions(giver):
        decide(SCORES)
    (found,) = giver.finish()
    return found.error


def test_choices_of_micro_batches_are_those_of_the_step():
    assert given([list(largest(SCORES).split(2))] * 2) == 0
    assert given([[largest(SCORES)]]) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_choices_by_rounded_scores_are_explained(precision):
    u = {"fp32": 2.0**-24, "bf16": 2.0**-8}[precision]
    draw = torch.Generator().manual_seed(1)
    noise = 1 + u * (2 * torch.rand(SCORES.shape, generator=draw) - 1)
    assert given([[largest(SCORES * noise)]]) <= BOUNDS[precision]


def test_close_scores_that_are_ordered_otherwise_are_explained(monkeypatch):
    close = SCORES.clone()
    close[0, :] = torch.tensor([3.0, 2.0, 1.0, 1.001, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(f"{__name__}.SCORES", close)
    other = largest(close)
    other[0, [2, 3]] = other[0, [3, 2]]
    assert 0 < given([[other]]) <= BOUNDS["bf16"]
    assert given([[other]]) > BOUNDS["fp32"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda scores: largest(-scores),
        lambda scores: largest(scores.roll(1, dims=1)),
        lambda scores: torch.cat([part - part.mean(1, keepdim=True) for part in scores.split(4, 1)],
                                 1),
    ],
    ids=["smallest", "neighbours", "parts"],
)  # fmt: skip
def test_a_fault_of_the_router_is_not_explained_by_rounding(wrong):
    chosen = wrong(SCORES)
    chosen = chosen if chosen.dtype == torch.bool else largest(chosen)
    assert given([list(chosen.split(3))]) > BOUNDS["bf16"]


@pytest.mark.parametrize(
    "parts",
    [
        [[largest(SCORES)], [largest(-SCORES)]],  # tensor ranks that differ
        [list(largest(SCORES).split(2))[:2]],  # a micro-batch less
        [[largest(SCORES)[:, :4]]],
        [[largest(SCORES).flatten()]],
    ],
)
def test_choices_that_do_not_fit_are_infinitely_wrong(parts):
    assert given(parts) == math.inf


def test_shares_of_a_sequence_end_in_padding():
    """Five places on two tensor ranks are three and three, the last of them padding."""
    chosen = SCORES[:5] > 0
    shares = torch.cat((chosen, torch.ones_like(chosen[:1]))).split(3)
    giver = Giver([Choices([[[part] for part in share.split(4, dim=1)] for share in shares])])
    with observed_decisions(giver):
        taken = observed(chosen, lambda other: (torch.tensor(0.0), torch.tensor(1.0)))
    assert torch.equal(taken, chosen)
    assert giver.finish() == [Given("", 0, 0.0, 1.0)]


def test_decisions_of_one_side_alone_are_infinitely_wrong():
    giver = Giver([])
    with observed_decisions(giver):
        decide(SCORES)
    assert [each.error for each in giver.finish()] == [math.inf]
    assert [each.error for each in Giver([Choices([[[]]])]).finish()] == [math.inf]


def test_what_ranks_record_is_read_by_step_and_layer(tmp_path):
    """Two stages of one layer, two data ranks, steps of one and of two micro-batches."""
    scores = torch.arange(2 * 2 * 3 * 4).view(2, 2, 3, 1, 4).double()  # stage, rank, micro-batch
    files = []
    for stage in range(2):
        for data in range(2):
            files.append(tmp_path / f"{stage}{data}.pt")

            def main(own: torch.Tensor = scores[stage, data]) -> int:
                for micro_batch in own:
                    decide(micro_batch % 5)
                return 0

            assert recorded(main, files[-1]) == 0
    steps = read_choices(files, tensor=1, pipeline=2, micro_batches=[1, 2])
    assert [[len(choice.parts[0]) for choice in step] for step in steps] == [[2, 2], [4, 4]]
    expected = [largest(scores[1, data, n] % 5) for n in (1, 2) for data in (0, 1)]
    assert all(
        torch.equal(part[0], each)
        for part, each in zip(steps[1][1].parts[0], expected, strict=True)
    )
    with pytest.raises(ValueError, match="3"):
        read_choices(files, tensor=1, pipeline=2, micro_batches=[2])
