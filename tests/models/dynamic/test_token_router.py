from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.dynamic.token_gather import Selection, chosen_first
from models.dynamic.token_router import ScoreThreshold, TokenRouter, capacity, top_k
from parallel.context import ParallelContext
from parallel.layer_state import layer_state_owners, update_layer_states
from parallel.precision import Precision
from tests.distributed import run_ranks
from tests.refusals import assert_refused

GAMMA, SEQ, BATCH = 0.25, 16, 4


def _scores(seed: int = 0, *, seq: int = SEQ, batch: int = BATCH) -> torch.Tensor:
    return torch.randn((seq, batch), generator=torch.Generator().manual_seed(seed))


def _router(ctx: ParallelContext | None = None, **changes) -> TokenRouter:
    options = {
        "rule": "threshold",
        "train_rule": "topk",
        "least_logit": 0.0,
        "multiple": 1,
        "momentum": 0.9,
    }
    return TokenRouter(GAMMA, **options | changes, ctx=ctx or ParallelContext.single())


@pytest.mark.parametrize(
    ("gamma", "length", "multiple", "expected"),
    [(0.5, 32, 1, 16), (0.125, 100, 1, 13), (0.125, 100, 16, 16), (0.9, 100, 64, 100), (1, 7, 1, 7),
     (0.001, 5, 1, 1)],
)  # fmt: skip
def test_capacity_is_constant_rounded_up_and_never_zero(gamma, length, multiple, expected):
    assert capacity(gamma, length, multiple=multiple) == expected


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.5, math.nan])
def test_a_capacity_outside_its_range_is_refused(gamma):
    with assert_refused(
        "capacity_gamma", value=gamma, constraint=("above 0", "at most 1"), remedy="share"
    ):
        capacity(gamma, 8)
    with assert_refused("capacity_multiple", value=0, constraint="1", remedy="raise"):
        capacity(0.5, 8, multiple=0)


def test_of_equal_scores_the_earlier_wins_and_there_are_always_k():
    values = torch.randint(0, 3, (50, 20), generator=torch.Generator().manual_seed(0)).float()
    for row, found in zip(values.tolist(), top_k(values, 7).tolist(), strict=True):
        best = sorted(range(20), key=lambda i, row=row: (-row[i], i))[:7]
        assert found == sorted(best)
    assert top_k(torch.zeros(1, 9), 4).tolist() == [[0, 1, 2, 3]]


def test_rows_with_fewer_chosen_tokens_are_filled_up():
    chosen = torch.tensor([[False, True, False, True], [False, False, True, False]])
    indices, valid, _ = chosen_first(chosen, 3)
    assert indices.tolist() == [[1, 3, 0], [2, 0, 1]]
    assert valid is not None
    assert valid.tolist() == [[True, True, False], [True, False, False]]


class _Step(NamedTuple):
    """Means over rows: between the k-th and the next score; the share above tau less k / s; how
    far the scores below the k-th one are apart, per share of the row."""

    middle: float
    excess: float
    slope: float


def _by_python(scores: torch.Tensor, tau: float = -math.inf) -> _Step:
    rows = [sorted(row, reverse=True) for row in scores.T.double().tolist()]
    k = capacity(GAMMA, SEQ)
    steps = [
        _Step(
            (row[k - 1] + row[k]) / 2,
            (sum(value > tau for value in row) - k) / SEQ,
            (row[k - 1] - row[k + k // 2]) / ((1 + k // 2) / SEQ),
        )
        for row in rows
    ]
    return _Step(*(sum(values) / len(rows) for values in zip(*steps, strict=True)))


def test_the_threshold_is_an_average_over_steps_and_what_it_is_wrong_by():
    router = _router()
    tau, average, offset = -math.inf, 0.0, 0.0
    for step in range(4):
        scores = _scores(step) * (1 + step)
        router(scores)
        middle, excess, slope = _by_python(scores, tau)
        average = middle if step == 0 else 0.9 * average + 0.1 * middle
        offset = 0.0 if step == 0 else offset + 0.1 * excess * slope
        tau = average + offset
        update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
        assert router.threshold.tau.item() == pytest.approx(tau, rel=1e-5)
        assert router.threshold.offset.item() == pytest.approx(offset, rel=1e-5)


def test_without_a_step_or_outside_of_training_the_threshold_stays():
    router = _router()
    assert router.eval()(_scores()).chosen.all()
    update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    assert router.threshold.tau.item() == -math.inf
    router.train()(_scores(seq=1))  # every token is taken: there is nothing between
    update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    assert router.threshold.tau.item() == -math.inf


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_moves_the_threshold_as_the_whole_does(num_parts):
    whole, parts = _router(), _router()
    for step in range(2):
        whole(_scores(step))
        for part in _scores(step).chunk(num_parts, dim=1):
            parts(part)
        for router in (whole, parts):
            update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=1e-6, atol=0.0)


def _on_data_ranks() -> float:
    ctx = ParallelContext.from_world()
    router = _router(ctx)
    router(_scores().chunk(2, dim=1)[ctx.data.rank])
    update_layer_states(layer_state_owners(router), ctx=ctx)
    return router.threshold.tau.item()


def test_data_ranks_agree_on_the_threshold_of_all_rows():
    first, second = run_ranks(_on_data_ranks, 2)
    assert first == second == pytest.approx(_by_python(_scores()).middle, rel=1e-6)


def test_the_threshold_keeps_its_precision_and_is_saved():
    threshold = ScoreThreshold(momentum=0.999, device=torch.device("cpu"))
    threshold.after_step(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), threshold).bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    threshold.after_step(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    assert threshold.tau.tolist() == pytest.approx([1.001])
    other = ScoreThreshold(momentum=0.9, device=torch.device("cpu"))
    other.load_state_dict(threshold.state_dict())
    assert torch.equal(other.tau, threshold.tau)
    assert set(threshold.state_dict()) == {"tau", "offset"}


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_calibrated_threshold_takes_its_share_of_unseen_tokens(spread):
    """Also where rows differ, some by much: their mean quantile is then not that of all tokens."""

    def scores(seed: int, batch: int) -> torch.Tensor:
        rows = torch.randn(batch, generator=torch.Generator().manual_seed(10_000 + seed))
        return _scores(seed, seq=128, batch=batch) + (spread * rows).exp()

    router = _router()
    for step in range(150):
        router(scores(step, 32))
        update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    held_out = router.eval()(scores(1000, 2048))
    assert held_out.fraction.mean().item() == pytest.approx(GAMMA, rel=0.1)
    assert held_out.recall.mean().item() > (0.4 if spread else 0.9)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["threshold", "predictor", "aux"])
def test_a_causal_rule_looks_at_one_token_alone_and_decides_the_same_token_by_token(rule):
    router = _router(rule=rule)
    scores, logits = _scores(), _scores(7)
    router(scores, logits=logits)
    update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    whole = router.eval()(scores, logits=logits).chosen
    assert 0 < whole.sum() < whole.numel()
    steps = [router.decide(s[None], logits=p[None]) for s, p in zip(scores, logits, strict=True)]
    assert torch.equal(torch.cat(steps, dim=1), whole)
    decided = {"threshold": scores > router.threshold.tau, "aux": scores > 0}
    assert torch.equal(whole, decided.get(rule, logits > 0).T)


def test_the_k_best_are_no_rule_for_a_generation():
    router = _router(rule="topk").eval()
    assert torch.equal(router(_scores()).selection.indices, top_k(_scores().T, 4))
    with assert_refused(
        "causal_router", value="topk", constraint="generation", remedy=("threshold", "predictor")
    ):
        router.decide(_scores())


def test_forced_tokens_are_taken_whatever_their_score():
    router = _router()
    forced = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    forced[:, [0, 9]] = True
    trained = router(_scores() - 10 * forced.T, forced=forced)
    assert trained.chosen[forced].all()
    assert (trained.chosen.sum(dim=1) == 4).all()
    update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    assert math.isfinite(router.threshold.tau.item())
    assert router.eval()(_scores() - 10 * forced.T, forced=forced).chosen[forced].all()
    # As many forced tokens as there is room for leave nothing to learn a threshold from.
    forced[:, :4] = True
    before = router.threshold.tau.clone()
    router.train()(_scores(), forced=forced)
    update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    assert torch.equal(router.threshold.tau, before)


def test_training_by_threshold_has_constant_room_and_keeps_the_best():
    router = _router(train_rule="threshold")
    first = router(_scores())  # everything is above -inf
    assert first.selection.indices.shape == (BATCH, 5)
    assert torch.equal(first.selection.indices, top_k(_scores().T, 5))
    update_layer_states(layer_state_owners(router), ctx=ParallelContext.single())
    then = router(_scores())
    above = (_scores() > router.threshold.tau).T
    assert above.sum(dim=1).tolist() == [3, 6, 5, 3]  # one row has more than there is room for
    best = torch.zeros_like(above).scatter_(1, top_k(_scores().T, 5), True)
    assert torch.equal(then.chosen, above & best)
    assert then.selection.valid is not None
    assert then.selection.valid.sum(dim=1).tolist() == [3, 5, 5, 3]


def _with_rounding(sequence_parallel: bool) -> tuple[Selection, float]:
    """Scores that are nearly equal, with another last bit on every rank."""
    ctx = ParallelContext.from_world(tensor=2, sequence_parallel=sequence_parallel)
    noise = torch.Generator().manual_seed(ctx.tensor.rank)
    scores = 1.0 + 1e-6 * torch.randn((SEQ, BATCH), generator=noise)
    router = _router(ctx)
    own = scores.chunk(2)[ctx.tensor.rank] if sequence_parallel else scores
    selection = router(own).selection
    update_layer_states(layer_state_owners(router), ctx=ctx)
    assert torch.equal(router.eval()(own).chosen, router.decide(own))
    return selection, router.threshold.tau.item()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_choose_the_same_tokens_although_their_scores_differ(sequence_parallel):
    (first, tau), (second, other) = run_ranks(_with_rounding, 2, sequence_parallel)
    assert torch.equal(first.indices, second.indices)
    assert tau == other


def test_a_repeated_forward_pass_repeats_the_decision_and_counts_once():
    router = _router()
    seen: list[torch.Tensor] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        # Another call, other scores: as on a device whose sums depend on timing, only worse.
        chosen = router(_scores(len(seen))).chosen
        seen.append(chosen)
        return (x * chosen.T).square()

    x = torch.ones(SEQ, BATCH, requires_grad=True)
    Precision().checkpoint(layer, x).sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(x.grad, 2.0 * seen[0].T)
    assert router.threshold.take_sums()[0] == BATCH
    assert not torch.equal(router(_scores(1)).chosen, seen[0])  # outside nothing is repeated
