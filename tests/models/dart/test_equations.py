"""Both streams against the equations in plain loops, fp64: logits, loss, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.base import TokenInputs
from models.dart.model import FAMILY
from models.dart.noise import Noise, draw_noise, full_noise
from tests.models.dart.cases import VARIANTS, config_of, model_of, text_of
from tests.models.dart.oracle import RowNoise, losses_of, told
from tests.tolerance import FP64

LENGTH, SEED = 17, 17  # of a text with every kind of block


def _row_noise(noise: Noise) -> RowNoise:
    length = noise.levels.shape[1]
    places = range(length) if noise.positions is None else noise.positions[0].tolist()
    begins = [i - place for i, place in enumerate(places)]
    return RowNoise(noise.levels[0].tolist(), noise.hidden[0].tolist(), begins, noise.keys[0])


def _case(variant: str) -> tuple[Any, Any, torch.Tensor]:
    config = config_of(**{"num_layers": 2, "p_uncond": 0.2, **VARIANTS[variant]})
    return config, model_of(config), text_of(LENGTH + 1, seed=SEED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_in_training_are_those_of_the_equations(variant):
    config, model, text = _case(variant)
    tokens, labels = text[:, :-1], text[:, 1:]
    output = model(TokenInputs(tokens))
    noise = draw_noise(tokens, None, config=config)
    weights = dict(model.named_parameters())
    row = told(weights, config, tokens[0].tolist(), _row_noise(noise))
    torch.testing.assert_close(output.logits[:, 0], row.logits, **FP64)
    torch.testing.assert_close(output.draft_logits[:, 0], row.draft_logits, **FP64)
    found, terms = FAMILY.loss(output, labels, config=config, ctx=model.ctx)
    causal, diffusion, draft = (losses_of(row, noise, labels[0].tolist(), config) / LENGTH).unbind()
    for name, value in {
        "lm_loss": causal,
        "diffusion_loss": diffusion,
        "draft_loss": draft,
    }.items():
        torch.testing.assert_close(terms[name], value.detach(), **FP64)
    w = config.ar_weight
    wanted = w * causal + (1 - w) * (diffusion + config.draft_weight * draft)
    torch.testing.assert_close(found, wanted, **FP64)
    both = (
        torch.autograd.grad(x, list(weights.values()), allow_unused=True) for x in (found, wanted)
    )
    for name, gradient, other in zip(weights, *both, strict=True):
        other = torch.zeros_like(weights[name]) if other is None else other
        gradient = torch.zeros_like(weights[name]) if gradient is None else gradient
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-11, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["base", "shared trunk, twice", "gaussian"])
def test_logits_in_evaluation_are_those_of_the_equations(variant):
    config, model, text = _case(variant)
    output = model.eval()(TokenInputs(text))
    noise = full_noise(text, None, config=config)
    row = told(dict(model.named_parameters()), config, text[0].tolist(), _row_noise(noise))
    torch.testing.assert_close(output.logits[:, 0], row.logits, **FP64)
    torch.testing.assert_close(output.draft_logits[:, 0], row.draft_logits, **FP64)


def test_the_rows_above_have_every_kind_of_block_and_hidden_context():
    """So that the comparisons say something about them."""
    config, _, text = _case("base")
    noise = draw_noise(text[:, :-1], None, config=config)
    assert set(noise.targets[0].tolist()) == {0, 1, 2}
    assert len(set(noise.levels[0].tolist())) >= 3
    assert (noise.positions[0] == 0).sum() >= 2
