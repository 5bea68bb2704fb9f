"""Parts of layers as modules of their own: together they are the layer."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import models.dynamic
from models.dynamic import (
    DTFDecisionLayer,
    DTFDynamicLayer,
    DTFRouter,
    MoDLayer,
    MoDRouter,
    PriorFFN,
)
from models.dynamic.carry import DTF_AUX, MOD_AUX, DynamicCarry
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.model import DTF, MOD
from parallel.context import ParallelContext
from tests.equivalence import build
from tests.models.families import CASES
from tests.refusals import assert_refused

HIDDEN = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))


def _changed(case: str, changes: dict[str, Any]) -> Any:
    config = CASES[case].config
    return type(config)(**{**config.model_dump(), **changes})


def _layer(config: DTFConfig | MoDConfig, name: str) -> torch.nn.Module:
    family = DTF if isinstance(config, DTFConfig) else MOD
    model = build(family.layer_specs(config), ParallelContext.single(), seed=3, noise=0.3)
    return model.get_submodule(name)


def _carry(hidden: Tensor, names: tuple[str, ...], config: DTFConfig | MoDConfig) -> DynamicCarry:
    tokens = TOKENS if config.router_score == "random" else None
    return DynamicCarry(hidden.transpose(0, 1), torch.zeros(len(hidden), len(names)), None, tokens)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"surprise": "kl", "gate_fn": "st", "prior_type": "swiglu", "router_detach": False},
        {"router_score": "linear", "causal_router": "predictor"},
        {"router_score": "random"},
        {"router_score": "cu", "force_first": False},
    ],
)
def test_decision_router_and_dynamic_layer_are_a_pair(changes, training):
    config = _changed("dtf", changes)
    pair = _layer(config, "pair_0").train(training)
    parts = (DTFDecisionLayer(config), DTFRouter(config), DTFDynamicLayer(config))
    for part, own in zip(parts, (pair.decision, pair.router, pair.dynamic), strict=True):
        part.layer.load_state_dict(own.state_dict())
        part.train(training)
    x, same = (HIDDEN.clone().requires_grad_() for _ in range(2))
    carry = pair(_carry(x, DTF_AUX, config))
    decision = parts[0](same)
    routed = parts[1](decision, TOKENS)
    y = parts[2](decision.posterior, routed)
    assert torch.equal(y, carry.hidden.transpose(0, 1))
    assert torch.equal(decision.original, same)
    loss, others = carry.hidden.square().mean(), y.square().mean()
    if config.has_prior:
        assert decision.prior is not None
        assert not torch.equal(decision.prior, decision.original)
    else:
        assert (decision.prior, decision.prior_loss) == (None, None)
    if training:
        aux = dict(zip(DTF_AUX, carry.aux.mean(dim=0), strict=True))
        losses = {name: entry * config.num_routed for name, entry in routed.losses.items()}
        if decision.prior_loss is not None:
            expected = aux["prior_loss"] * config.num_routed
            torch.testing.assert_close(decision.prior_loss, expected)
            loss, others = loss + expected, others + decision.prior_loss
        torch.testing.assert_close(losses["gate_mean"], aux["gate_mean"] * config.num_routed)
    loss.backward()
    others.backward()
    torch.testing.assert_close(same.grad, x.grad)
    gradients = {name: p.grad for name, p in pair.named_parameters()}
    prefixes = ("decision", "router", "dynamic")
    for part, prefix in zip(parts, prefixes, strict=True):
        for name, parameter in part.layer.named_parameters():
            expected = gradients[f"{prefix}.{name}"]
            assert (parameter.grad is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"gate_fn": "raw", "force_first": True}, {"router_score": "random"}]
)
def test_router_and_block_are_a_routed_layer(changes, training):
    config = _changed("mod", changes)
    layer = _layer(config, "layer_1").train(training)
    alone = MoDLayer(config).train(training)
    alone.router.layer.load_state_dict(layer.router.state_dict())
    alone.layer.load_state_dict(layer.dynamic.state_dict())
    carry = layer(_carry(HIDDEN, MOD_AUX, config))
    y, routed = alone(HIDDEN, TOKENS)
    assert torch.equal(y, carry.hidden.transpose(0, 1))
    left = ~routed.chosen
    assert torch.equal(y[left], HIDDEN[left])
    assert not (y[routed.chosen] == HIDDEN[routed.chosen]).all(dim=-1).any()
    if training:
        assert routed.chosen.sum(dim=1).tolist() == [12, 12]
    y.sum().backward()
    assert all(p.grad is not None for p in alone.parameters())


def test_every_public_name_is_there_and_torch_is_imported_with_the_first_that_needs_it():
    line = "import sys, models.dynamic as m; m.DTFConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", line], check=True)
    assert all(hasattr(models.dynamic, name) for name in models.dynamic.__all__)
    with pytest.raises(AttributeError, match="no attribute 'DTFRooter'"):
        _ = models.dynamic.DTFRooter


def test_the_router_chooses_the_highest_scores():
    routed = MoDRouter(_changed("mod", {}))(HIDDEN)
    for scores, chosen in zip(routed.scores, routed.chosen, strict=True):
        assert scores[chosen].min() >= scores[~chosen].max()


def test_at_first_the_prior_expects_nothing_and_then_it_learns():
    config = _changed("dtf", {})
    torch.manual_seed(0)
    decision, prior = DTFDecisionLayer(config), PriorFFN(config)
    assert not prior(HIDDEN).any()
    output = decision(HIDDEN)
    assert torch.equal(output.prior, output.original)
    torch.testing.assert_close(output.prior_loss, torch.tensor(1.0))
    optimizer = torch.optim.Adam(decision.parameters(), lr=1e-2)
    for _ in range(20):
        decision(HIDDEN).prior_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert decision(HIDDEN).prior_loss < 0.9


def test_what_is_not_there_is_not_made_up():
    with pytest.raises(ValueError, match=r"capacity_gamma=1\.0 routes nothing"):
        MoDLayer(_changed("mod", {"capacity_gamma": 1.0}))
    with assert_refused("router_score", value="cu", constraint="prior", remedy=("vpr", "ce")):
        PriorFFN(_changed("dtf", {"router_score": "cu"}))
    with pytest.raises(ValueError, match="give tokens"):
        MoDRouter(_changed("mod", {"router_score": "random"}))(HIDDEN)
