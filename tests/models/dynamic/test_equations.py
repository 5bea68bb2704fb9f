"""Logits, losses and every gradient against the independent form of the equations in fp64."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs
from models.dynamic.model import loss_weights
from models.dynamic.token_router import capacity
from parallel.layer_state import layer_state_owners, persistent_buffers, update_layer_states
from tests.models.dynamic import oracle
from tests.models.dynamic.cases import CTX, VARIANTS, config_of, family_of, model_of, tokens_of
from tests.tiers import spread

SEQ, BATCH = 17, 2
# Rotary angles and the losses of the carry are fp32 even where the parameters are fp64.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def _expected_loss(config, parameters, tokens, labels, documents=None):
    """The loss of a training step, and the logits [s, b, V]."""
    rule = oracle.best(capacity(config.capacity_gamma, SEQ, multiple=config.capacity_multiple))
    rows = [oracle.row(config, parameters, row, rule, documents) for row in tokens]
    logits = torch.stack([row.logits for row in rows], dim=1)
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.T.flatten())
    for name, weight in loss_weights(config).items():
        for row in rows:
            if name in row.aux:
                total = total + weight * row.aux[name] / config.num_routed / len(rows)
    return total, logits


def _assert_equal_gradients(model, found, expected) -> None:
    parameters = dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad(loss, list(parameters.values())) for loss in (found, expected)
    )
    for name, mine, other in zip(parameters, ours, theirs, strict=True):
        assert other.abs().max() > 0, name
        scale = other.abs().max().clamp(min=0.01)  # of scalars, in which tokens cancel
        torch.testing.assert_close(
            mine / scale, other / scale, rtol=0.0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("variant", "packed"), spread(VARIANTS, [False, True]))
def test_a_training_step_is_that_of_the_equations(variant, packed):
    family, changes = VARIANTS[variant]
    # Weights at which no loss is lost in the rounding of another.
    changes = {"router_z_loss_weight": 0.5, "causal_router_loss_weight": 0.5, **changes}
    config = config_of(family, **changes)
    model = model_of(config, segmented=packed)
    stream = tokens_of(SEQ + 1, batch=BATCH)
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    documents = [0] * 7 + [1] * 10 if packed else None
    segments = torch.tensor(documents).int().expand(BATCH, -1).contiguous() if packed else None
    output = model(TokenInputs(tokens, segments))
    found = family_of(config).loss(output, labels, config=config, ctx=CTX).total
    parameters = dict(model.named_parameters())
    expected, logits = _expected_loss(config, parameters, tokens, labels, documents)
    torch.testing.assert_close(output.logits, logits, **TOLERANCE)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    _assert_equal_gradients(model, found, expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_evaluated_model_is_that_of_the_equations(variant):
    family, changes = VARIANTS[variant]
    config = config_of(family, **changes)
    model, tokens = model_of(config).double(), tokens_of(SEQ, batch=BATCH)
    model(TokenInputs(tokens))
    update_layer_states(layer_state_owners(model), ctx=CTX)
    taus = {name: tau.item() for name, tau in persistent_buffers(model).items()}
    found = model.eval()(TokenInputs(tokens)).logits
    parameters, rule = dict(model.named_parameters()), oracle.above(config, taus)
    for i, row in enumerate(tokens):
        expected = oracle.row(config, parameters, row, rule).logits
        torch.testing.assert_close(found[:, i], expected, **TOLERANCE)
