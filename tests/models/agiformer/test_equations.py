"""The whole model against the equations in plain loops, fp64."""

from __future__ import annotations

import pytest
import torch

from models.agiformer.model import FAMILY
from models.base import TokenInputs
from tests.models.agiformer.cases import THINKING, config_of, model_of, text_of
from tests.models.agiformer.oracle import told
from tests.tolerance import FP64

VARIANTS = {
    "base": {},
    "thinking": THINKING,
    "triple": {"fusion": "triple"},
    "soft halting": {"halting": "soft", "thinking_steps": 3},
    "independent head": {"byte_head": "independent"},
    "floor of the decay": {"decay_floor": 0.9},
    "low plasticity": {"plasticity": 0.1},
    "patches of 3, kernel of 5": {"patch_size": 3, "patch_kernel": 5},
    "patches of 1": {"patch_size": 1, "patch_kernel": 1},
    "window of 1": {"window_size": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_gradients_and_ponder_costs_are_those_of_the_equations(variant):
    config = config_of(**{"num_layers": 2, **VARIANTS[variant]})
    model, text = model_of(config), text_of(23)
    output = model(TokenInputs(text))
    weights = dict(model.state_dict(keep_vars=True))
    weights = {n: w.to(torch.float64) for n, w in weights.items()}
    expected = told(weights, config, text[0].tolist())
    torch.testing.assert_close(output.logits[:, 0], expected.logits, **FP64)
    parameters = dict(model.named_parameters())
    if config.halting == "act":
        ponder = torch.stack(expected.ponder).mean()
        torch.testing.assert_close(output.aux[0, 0], ponder, **FP64)
        mean_steps = sum(expected.steps) / len(expected.steps)
        assert output.aux[0, 1].item() == pytest.approx(mean_steps)
        found = output.logits.square().mean() + output.aux[0, 0]
        wanted = expected.logits.square().mean() + ponder
    else:
        found, wanted = output.logits.square().mean(), expected.logits.square().mean()
    gradients = torch.autograd.grad(found, list(parameters.values()))
    others = torch.autograd.grad(wanted, list(parameters.values()))
    for name, gradient, other in zip(parameters, gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-11, msg=name)


def test_patches_of_the_thinking_model_halt_after_different_numbers_of_steps():
    """So that the comparison above says something about halting."""
    config = config_of(num_layers=2, **THINKING)
    model, text = model_of(config), text_of(23)
    weights = {n: w.double() for n, w in model.state_dict().items()}
    assert len(set(told(weights, config, text[0].tolist()).steps)) >= 3
    assert FAMILY.num_parameters(config) == sum(p.numel() for p in model.parameters())
