"""A difference is found, located, and measured against the right bound."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config import parse_config
from pretrain.prove.bounds import FLOOR, FP32, Bounds
from pretrain.prove.choices import Given
from pretrain.prove.comparison import (
    Row,
    choice_rows,
    gradient_row,
    largest_update,
    number_rows,
    state_rows,
    sum_rows,
    untrained_row,
    update_row,
)
from pretrain.prove.outputs import Owners, Saved
from pretrain.prove.truth.oracle import State, TrueStep, learning_rate
from tests.pretrain.run_values import run_values

TRAINING = parse_config(run_values(training__grad_clip=0.0)).training
BETA1, BETA2 = TRAINING.betas


@pytest.fixture
def truth() -> TrueStep:
    """The first step of two parameters, one of which has a gradient far below the norm."""
    draw = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(3, 4, generator=draw).double() for name in ("a", "b")}
    gradients["b"] *= 1e-6
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    first = {name: (1 - BETA1) * g for name, g in gradients.items()}
    second = {name: (1 - BETA2) * g.square() for name, g in gradients.items()}
    weights = {name: torch.ones(3, 4).double() for name in gradients}
    state = State(weights, first, second, {}, 1)
    rates = dict.fromkeys(gradients, 1e-3)
    decays = dict.fromkeys(gradients, 0.1)
    return TrueStep(2.0, norm, 1.0, 1e-3, rates, decays, gradients, state, 3.0)


def saved(truth: TrueStep, **changes) -> Saved:
    state = truth.state
    same = Saved(torch.float32, state.weights, state.weights, state.exp_avg, state.exp_avg_sq, {},
                 {1}, Owners(None))  # fmt: skip
    return same._replace(**changes)


def rows(found: Saved, truth: TrueStep) -> dict[str, Row]:
    before = State({}, {n: torch.zeros(3, 4) for n in "ab"}, {}, {}, 0)
    bounds = Bounds.of("fp32")
    all_rows = state_rows(found, truth, TRAINING, bounds)
    all_rows.append(gradient_row(found, truth, before, TRAINING, bounds))
    return {each.check: each for each in all_rows}


def test_the_truth_itself_passes(truth):
    assert all(row.passed for row in rows(saved(truth), truth).values())


@pytest.mark.parametrize("factor", [2.0, 0.5, 1 + 3 * FP32, float("nan")])
def test_a_gradient_that_is_off_fails_by_name(factor, truth):
    wrong = {**truth.state.exp_avg, "a": truth.state.exp_avg["a"] * factor}
    row = rows(saved(truth, exp_avg=wrong), truth)["gradients"]
    assert not row.passed
    assert row.where == "a"


def test_a_gradient_below_the_floor_is_measured_against_the_norm(truth):
    noise = {**truth.state.exp_avg, "b": truth.state.exp_avg["b"] * 1.01}
    assert rows(saved(truth, exp_avg=noise), truth)["gradients"].passed
    allowed = FP32 * FLOOR * truth.norm * (1 - BETA1)
    large = {**truth.state.exp_avg, "b": truth.state.exp_avg["b"] + 2 * allowed}
    row = rows(saved(truth, exp_avg=large), truth)["gradients"]
    assert (row.passed, row.where) == (False, "b")


@pytest.fixture
def before(truth) -> State:
    """Weights of which the truth's are one update of AdamW."""
    before = {}
    for name, weight in truth.state.weights.items():
        first = truth.state.exp_avg[name] / (1 - BETA1)
        second = (truth.state.exp_avg_sq[name] / (1 - BETA2)).sqrt() + TRAINING.eps
        before[name] = (weight + 1e-3 * first / second) / (1 - 1e-3 * 0.1)
    return State(before, {}, {}, {}, 0)


def test_the_update_is_that_of_the_saved_moments_whatever_they_are(truth, before):
    assert update_row(saved(truth), truth, before, TRAINING).passed
    for masters in (before.weights, {n: w * (1 + 1e-4) for n, w in truth.state.weights.items()}):
        assert not update_row(saved(truth, masters=masters), truth, before, TRAINING).passed


def test_untrained_parameters_keep_their_bits(truth):
    frozen = {"c": torch.ones(2).double()}
    assert untrained_row(saved(truth, buffers=frozen), frozen).passed
    assert not untrained_row(saved(truth, buffers={"c": frozen["c"] + 1e-6}), frozen).passed
    assert not untrained_row(saved(truth), frozen).passed


def test_a_parameter_that_is_missing_is_infinitely_wrong(truth):
    found = {"a": truth.state.exp_avg["a"]}
    row = rows(saved(truth, exp_avg=found), truth)["exp_avg"]
    assert (row.error, row.where) == (math.inf, "b is missing")
    found = truth.state.exp_avg | {"c": truth.state.exp_avg["a"]}
    row = rows(saved(truth, exp_avg=found), truth)["exp_avg"]
    assert (row.error, row.where) == (math.inf, "c is surplus")


def test_a_weight_may_move_where_its_gradient_is_rounding(truth):
    quiet = truth.state.exp_avg_sq | {"b": torch.zeros(3, 4).double()}
    silent = truth.state.exp_avg | {"b": torch.zeros(3, 4).double()}
    state = truth.state._replace(exp_avg=silent, exp_avg_sq=quiet)
    moved = state.weights | {"b": state.weights["b"] + 1.5e-3}
    found = saved(truth._replace(state=state), weights=moved, masters=moved)
    assert rows(found, truth._replace(state=state))["weights"].passed
    moved = state.weights | {"a": state.weights["a"] + 1.5e-3}
    found = saved(truth._replace(state=state), weights=moved, masters=moved)
    row = rows(found, truth._replace(state=state))["weights"]
    assert (row.passed, row.where) == (False, "a")


def test_step_counts_and_forward_weights_are_exact(truth):
    assert not rows(saved(truth, steps={0}), truth)["step counts"].passed
    stale = {name: weight + 1e-6 for name, weight in truth.state.weights.items()}
    assert not rows(saved(truth, weights=stale), truth)["weights of the forward pass"].passed


def test_numbers_of_a_step_are_compared_and_missing_ones_fail(truth):
    record = {"loss": 2.0, "grad_norm": truth.norm, "lr": 1e-3, "eval_loss": 3.0}
    bounds = Bounds.of("fp32")
    found = number_rows(1, {1: record}, truth, bounds)
    assert [row.check for row in found] == [
        "loss", "gradient norm", "learning rate", "held-out loss"
    ]  # fmt: skip
    assert all(row.passed for row in found)
    for key in record:
        for wrong in (
            {**record, key: record[key] * 1.001},
            {k: v for k, v in record.items() if k != key},
        ):
            failed = [r for r in number_rows(1, {1: wrong}, truth, bounds) if not r.passed]
            assert len(failed) == 1


@pytest.mark.parametrize("in_bf16", [False, True])
def test_sums_in_bf16_have_no_more_bits_than_their_terms(in_bf16):
    draw = torch.Generator().manual_seed(0)
    terms = torch.randn(2, 30, 40, generator=draw).bfloat16()
    total = (terms[0] + terms[1] if in_bf16 else terms.float().sum(dim=0)).float()
    before = torch.randn(30, 40, generator=draw)
    moment = BETA1 * before + (1 - BETA1) * total  # in fp32, as an optimizer computes it
    training = parse_config(run_values(training__precision="bf16")).training
    truth = TrueStep(0.0, 1.0, 1.0, 0.0, {}, {}, {}, State({}, {}, {}, {}, 2), None)
    found = Saved(torch.bfloat16, {}, {}, {"a": moment.double()}, {}, {}, {2}, Owners(None))
    earlier = State({}, {"a": before.double()}, {}, {}, 1)
    (row,) = sum_rows(found, truth, earlier, training, 2)
    assert row.passed != in_bf16, row
    assert sum_rows(found, truth, earlier, training, 1) == []
    assert sum_rows(found, truth._replace(scale=0.5), earlier, training, 2) == []


def test_a_threshold_is_measured_by_the_scores_that_it_follows(truth):
    bounds = Bounds.of("fp32")
    near_zero = {"layer_1.tau": torch.tensor([1e-6]).double()}
    state = truth.state._replace(buffers=near_zero)
    for given, passed in (((Given("layer_1", 0, 0.0, 1.0),), True), ((), False)):
        told = truth._replace(state=state, given=given)
        found = saved(told, buffers={"layer_1.tau": near_zero["layer_1.tau"] + 2e-6})
        (row,) = [r for r in state_rows(found, told, TRAINING, bounds) if r.check == "layer states"]
        assert row.passed == passed, row


def test_choices_that_rounding_does_not_explain_fail_by_layer(truth):
    bounds = Bounds.of("fp32")
    assert choice_rows(truth, bounds) == []
    for error, passed in ((0.0, True), (FP32, True), (2 * FP32, False), (math.nan, False)):
        given = [Given("layer_1", 0, 0.0), Given("layer_3", 2, error)]
        (row,) = choice_rows(truth._replace(given=given), bounds)
        assert row.passed == passed
        assert ("layer_3" in row.where) == (error != 0)


def test_bounds_of_bf16_grow_with_the_root_of_the_depth():
    shallow, deep = (Bounds.of("bf16", roundings=n).gradient.value for n in (50, 200))
    assert deep == pytest.approx(2 * shallow)
    assert shallow < 0.2


@pytest.mark.parametrize(
    ("step", "settings", "share"),
    [
        (1, {"warmup_steps": 2}, 0.5),
        (10, {"schedule": "cosine", "min_lr_ratio": 0.25}, 0.25),
        (5, {"schedule": "cosine", "min_lr_ratio": 0.0}, 0.5),
        (9, {"schedule": "wsd", "decay_steps": 2, "min_lr_ratio": 0.0}, 0.5),
        (9, {"schedule": "constant"}, 1.0),
    ],
)
def test_the_learning_rate_follows_the_documented_schedule(step, settings, share):
    changes = {f"training__{name}": value for name, value in settings.items()}
    training = parse_config(run_values(**changes)).training
    assert learning_rate(step, training) == pytest.approx(share * training.lr)


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.95), (0.9, 0.999), (0.99, 0.9)])
def test_the_largest_update_is_that_of_the_worst_gradients(betas, step):
    """Of torch's AdamW in fp64: gradients in proportion to a_i / b_i, and no others."""

    def update(gradients: torch.Tensor) -> float:
        weight = torch.zeros(1, dtype=torch.float64)
        options = {"betas": betas, "eps": 0.0, "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([weight], lr=1.0, **options)
        for gradient in gradients:
            before, weight.grad = weight.clone(), gradient.view(1)
            optimizer.step()
        return abs(float(weight - before))

    beta1, beta2 = betas
    places = torch.arange(step, dtype=torch.float64)
    worst = beta1 ** (step - 1 - places) / beta2 ** (step - 1 - places)
    most = largest_update(betas, step)
    # Gradients of 0 would leave 0 / 0 in the steps before the last.
    assert update(worst.clamp(min=1e-9)) == pytest.approx(most, rel=1e-6)
    draw = torch.Generator().manual_seed(0)
    for gradients in torch.randn(200, step, dtype=torch.float64, generator=draw):
        assert update(gradients) <= most * (1 + 1e-12)
