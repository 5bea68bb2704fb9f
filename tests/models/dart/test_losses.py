"""The losses: the bound on a known source, what the weights of losses turn off, the schedules."""

from __future__ import annotations

import math

import pytest
import torch

from models.base import TokenInputs
from models.dart.carry import DARTOutput
from models.dart.model import FAMILY
from models.dart.noise import DIFFUSION, draw_noise
from models.dart.schedule import alphas
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.models.dart.cases import config_of, model_of, text_of
from tests.models.dart.oracle import kept
from tests.tolerance import FP64

SCHEDULES = ("linear", "cosine", "quadratic")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("p_plan", [0.0, 0.5])
def test_the_diffusion_loss_of_the_best_predictor_is_the_entropy_of_the_source(schedule, p_plan):
    """Independent tokens: no context helps, and the bound is tight. Within 1 %."""
    config = config_of(
        vocab_size=8, diffusion_steps=64, diffusion_schedule=schedule, p_plan=p_plan, block_size=4
    )
    p = torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 12
    generator = torch.Generator().manual_seed(0)
    rows, length = 40_000, 33
    text = torch.multinomial(p, rows * length, replacement=True, generator=generator)
    text = text.view(rows, length)
    tokens, labels = text[:, :-1], text[:, 1:].clone()
    labels[:, -1] = -100  # the last place is no target of the diffusion loss
    # A salt for every row: of eight tokens to begin with, a first block has eight draws.
    noise = draw_noise(tokens, None, config=config, salt=torch.arange(rows).unsqueeze(1))
    logits = p.log().expand(length - 1, rows, -1)
    output = DARTOutput(logits, logits, noise.levels, noise.targets)
    _, terms = FAMILY.loss(output, labels, config=config, ctx=ParallelContext.single())
    entropy = -(p * p.log()).sum().item()
    assert terms["diffusion_loss"].item() == pytest.approx(entropy, rel=0.01)
    assert terms["lm_loss"].item() == pytest.approx(entropy, rel=0.01)
    if p_plan:
        assert terms["draft_loss"].item() == pytest.approx(entropy, rel=0.01)


def test_dropping_the_correction_for_drafts_would_halve_the_bound():
    """So that the test above says something about it."""
    config = config_of(p_plan=0.5, p_uncond=0.0)
    noise = draw_noise(text_of(64, batch=500), None, config=config)
    share = (noise.targets == DIFFUSION).any(dim=0).double().mean()
    scored = (noise.levels < config.diffusion_steps).double().mean()
    assert share == pytest.approx(1.0, abs=0.02)
    assert scored == pytest.approx(0.5 * 7 / 8, abs=0.02)


@pytest.mark.parametrize("kind", ["masked", "gaussian"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [8, 100, 1000])
def test_schedules_fall_from_one_to_exactly_zero_by_their_formulas(kind, schedule, steps):
    config = config_of(diffusion_type=kind, diffusion_schedule=schedule, diffusion_steps=steps)
    values = alphas(config)
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert (values.diff() < 0).all()
    assert values[-2] < (0.2 if steps == 8 else 0.02)  # close to noise at any number of steps
    for k in (0, 1, steps // 2, steps - 1, steps):
        assert values[k].item() == pytest.approx(kept(config, k), rel=1e-9)


def test_with_the_causal_loss_alone_the_diffusion_blocks_stay_and_the_rest_is_a_llama():
    """At the start, where the exchange is 0: half of the layers, the same logits and gradients."""
    config = config_of(ar_weight=1.0, p_uncond=0.0)
    model, text = model_of(config, noise=0.0), text_of(20, batch=2)
    output = model(TokenInputs(text[:, :-1]))
    total, _ = FAMILY.loss(output, text[:, 1:], config=config, ctx=model.ctx)
    total.backward()
    touched = {
        name
        for name, p in model.named_parameters()
        if (".diffusion." in name or name.startswith("embedding.time")) and p.grad is not None
        and p.grad.abs().max() > 0
    }  # fmt: skip
    assert not touched
    names = LlamaConfig.model_fields.keys() - {"family"}
    shape = {n: v for n, v in config.model_dump().items() if n in names}
    llama_config = LlamaConfig(**{**shape, "num_layers": config.num_pairs})
    llama = SequentialModel(LLAMA.layer_specs(llama_config), ParallelContext.single()).double()
    own = dict(model.named_parameters())
    theirs = {
        n: n.replace("block_", "pair_").replace(".", ".causal.", 1)
        for n, _ in llama.named_parameters()
    }
    theirs = {n: o if n.startswith("block_") else n for n, o in theirs.items()}
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            parameter.copy_(own[theirs[name]])
    logits = llama(TokenInputs(text[:, :-1]))
    torch.testing.assert_close(output.logits, logits, **FP64)
    LLAMA.loss(logits, text[:, 1:], config=llama_config, ctx=llama.ctx).total.backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, own[theirs[name]].grad, **FP64)


def test_levels_are_uniform_and_tokens_are_hidden_as_often_as_their_level_says():
    config = config_of(p_plan=0.0, p_uncond=0.0, block_size=4)
    noise = draw_noise(text_of(64, batch=2000), None, config=config)
    starts = slice(4, 60, 4)  # the first block has as many levels as there are first tokens
    levels = noise.levels[:, starts].flatten().long()
    counts = levels.bincount(minlength=9)[1:].double()
    expected = len(levels) / 8
    assert ((counts - expected).square() / expected).sum() < 29.9  # chi^2 of 7, p = 1e-4
    for k in range(1, 9):
        at = (noise.levels == k)[:, 4:60]
        share = noise.hidden[:, 4:60][at].double().mean().item()
        bound = 4 * math.sqrt(0.25 / at.sum().item())
        assert share == pytest.approx(1 - kept(config, k), abs=bound)


def test_another_salt_is_another_draw_and_the_same_is_the_same():
    config, text = config_of(), text_of(64, batch=2)
    first, again = (draw_noise(text, None, config=config, salt=1) for _ in range(2))
    other = draw_noise(text, None, config=config, salt=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.levels, other.levels)
