"""Batches of rows of any length score each row as one plain forward pass of it alone does."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from models.base import TokenInputs, logits_of
from models.evaluation import scoring
from models.evaluation.scoring import Request, score
from parallel.carry import SequentialModel
from tests.models.checkpoints import model
from tests.models.families import CASES, evaluated
from tests.refusals import assert_refused
from tests.tolerance import FP64

FAMILIES = ("agiformer", "amrpa", "daria_former", "dart", "dtf", "llama", "mod")
VOCAB = 61


@cache
def double(name: str) -> SequentialModel:
    """A model in evaluation and fp64, whose thresholds have seen tokens."""
    family, config = CASES[name]
    return evaluated(model(config, family).train(), rows(2, 24)).double()


def rows(count: int, length: int, *, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def alone(of: SequentialModel, request: Request) -> tuple[float, bool]:
    """One row without padding, cache or chunks."""
    tokens = torch.tensor([request.tokens])
    with torch.no_grad():
        logits = logits_of(of(TokenInputs(tokens[:, :-1])))[-request.num_scored :, 0]
    targets = tokens[0, -request.num_scored :]
    log_probs = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return log_probs.sum().item(), torch.equal(logits.argmax(-1), targets)


def requests(of: SequentialModel) -> list[Request]:
    """Rows of 2 to 33 tokens; choices of one context that are one token and several; one greedy."""
    long, other = rows(2, 33).tolist()
    best = logits_of(of(TokenInputs(torch.tensor([long[:9]]))))[-1].argmax().item()
    return [
        Request(long[:2], 1),
        Request(long, 32),
        Request(other[:20], 3),
        *(Request([*long[:17], token], 1) for token in (4, 9)),
        Request([*long[:17], 9], 6),
        Request([*long[:9], best], 1),
        Request(other[:11], 10),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_different_length_score_as_each_of_them_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PREFILL_CHUNK", 7)  # so that rows are of several chunks
    of = double(name)
    given = requests(of)
    expected = [alone(of, request) for request in given]
    assert {greedy for _, greedy in expected} == {True, False}
    for batch_size in (4, 1):
        answered: list[int] = []
        found = score(of, given, batch_size=batch_size, progress=answered.append)
        assert sum(answered) == len(given)
        assert [s.is_greedy for s in found] == [greedy for _, greedy in expected]
        torch.testing.assert_close(
            torch.tensor([s.log_likelihood for s in found], dtype=torch.float64),
            torch.tensor([value for value, _ in expected], dtype=torch.float64),
            **FP64,
        )


def test_choices_of_one_token_share_their_context() -> None:
    of, seen = double("llama"), []
    context = rows(1, 12)[0].tolist()
    with torch.no_grad():
        hook = of.register_forward_pre_hook(lambda _, given: seen.append(given[0].tokens.shape))
        score(of, [Request([*context, token], 1) for token in range(8)], batch_size=4)
        hook.remove()
    assert seen == [(1, 12)]


def test_nothing_to_score_and_nothing_to_score_it_from_are_refused() -> None:
    of = double("llama")
    with assert_refused("request 1", value=2, constraint="least one", remedy="context"):
        score(of, [Request([1, 2], 1), Request([1, 2], 2)], batch_size=2)
    with assert_refused("request 0", value=0, constraint="least one", remedy="context"):
        score(of, [Request([1, 2], 0)], batch_size=2)
    with assert_refused("batch_size", value=0, constraint="1 or more", remedy="raise"):
        score(of, [], batch_size=0)
    assert score(of, [], batch_size=1) == []
