"""Adaptive computation: halting, its cost, and stopping early."""

from __future__ import annotations

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.agiformer.model import FAMILY
from models.agiformer.reasoning import RecurrentReasoningBlock
from models.base import TokenInputs
from parallel.context import ParallelContext
from tests.distributed import run_ranks
from tests.equivalence import Measured, build, measure
from tests.models.agiformer.cases import THINKING, config_of, model_of, text_of
from tests.tolerance import FP64, assert_close

CONFIG = config_of(num_layers=2, **THINKING)


def _block(ctx: ParallelContext | None = None, **changes) -> RecurrentReasoningBlock:
    specs = FAMILY.layer_specs(config_of(num_layers=1, **{**THINKING, **changes}))
    ctx = ctx or ParallelContext.single()
    return build(specs, ctx, seed=5, noise=0.2).double().reasoning


def _states(count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 32, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_stopping_early_gives_the_same_output_at_the_cost_of_the_steps_taken():
    block, s, rows = _block(), _states(), []
    expected, halting = block._weighted_steps(s)
    block.up.register_forward_hook(lambda m, args, out: rows.append(args[0][..., 0].numel()))
    torch.testing.assert_close(block._while_running(s), expected, **FP64)
    assert len(set(halting.steps.flatten().tolist())) >= 3
    assert rows[0] == s[..., 0].numel()
    assert sum(rows) == int(halting.steps.sum()) < CONFIG.thinking_steps * rows[0]
    torch.testing.assert_close(block._weighted_steps(s, may_stop=True)[0], expected, **FP64)


@torch.no_grad()
def test_weights_are_a_distribution_over_the_steps_taken():
    block, s = _block(), _states()
    halting, total = block.begin(s), torch.zeros(40, 3, dtype=torch.float64)
    for n in range(1, CONFIG.thinking_steps + 1):
        update, p = block.step(s)
        s = s + update
        ran = halting.runs
        halting, weight = block.halted(halting, p, n)
        assert torch.equal(weight > 0, ran)
        total += weight
    torch.testing.assert_close(total, torch.ones_like(total), **FP64)
    assert not halting.runs.any()
    assert int(halting.steps.max()) == CONFIG.thinking_steps


@torch.no_grad()
def test_the_block_starts_as_a_norm_that_takes_about_three_steps():
    spec = FAMILY.layer_specs(config_of(thinking_steps=9, init_std=0.02))[-2]
    model = build([spec], ParallelContext.single(), seed=1, noise=0.0).double()
    s = _states()
    y, halting = model.reasoning._weighted_steps(s)
    torch.testing.assert_close(y, s, **FP64)
    assert set(halting.steps.flatten().tolist()) == {4}  # sigmoid(-1) = 0.27: 0.81 after three


def test_generation_stops_early_and_agrees_with_the_whole():
    model, text, rows = model_of(CONFIG), text_of(80, batch=3), []
    whole = model(TokenInputs(text)).logits
    model.reasoning.up.register_forward_hook(
        lambda module, args, output: rows.append(args[0][..., 0].numel())
    )
    with torch.no_grad():
        cache = model.new_cache(3, 80)
        parts = [model(TokenInputs(x), cache).logits for x in text.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts), whole.detach(), **FP64)
    assert 20 * 3 < sum(rows) < 20 * 3 * CONFIG.thinking_steps


@pytest.mark.parametrize("halting", ["soft", "none"])
def test_other_halting_computes_every_step_and_has_no_cost(halting):
    block, s = _block(halting=halting), _states()
    out = block._all_steps(s)
    for _ in range(CONFIG.thinking_steps):
        update, p = block.step(s)
        s = s + (update if p is None else (1 - p).unsqueeze(-1) * update)
    torch.testing.assert_close(out, s, **FP64)
    assert (block.halt is None) == (halting == "none")


def _rank(sequence_parallel: bool) -> tuple[Measured, torch.Tensor]:
    ctx = ParallelContext.from_world(tensor=2, sequence_parallel=sequence_parallel)
    return _measured(ctx), _stopped(ctx)


def _measured(ctx: ParallelContext) -> Measured:
    text = text_of(33, batch=2)
    inputs = TokenInputs(text[:, :-1].contiguous())
    return measure(FAMILY, CONFIG, inputs, text[:, 1:], ctx, seed=5, noise=0.2, dtype=torch.float64)


@torch.no_grad()
def _stopped(ctx: ParallelContext) -> torch.Tensor:
    if ctx.sequence_parallel:
        return torch.empty(0)
    return _block(ctx)._weighted_steps(_states(), may_stop=True)[0]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_ranks_take_the_steps_of_one_in_training_and_when_they_stop(sequence_parallel):
    """Under sequence parallelism ranks hold patches that halt at different steps."""
    expected = _measured(ParallelContext.single())
    assert 1.05 < expected.terms["ponder_steps"] < CONFIG.thinking_steps - 0.05
    for measured, stopped in run_ranks(_rank, 2, sequence_parallel):
        assert_close(measured.loss, expected.loss, FP64["rtol"], "loss")
        for name, term in expected.terms.items():
            assert_close(measured.terms[name], term, FP64["rtol"], name)
        for name, gradient in expected.gradients.items():
            assert_close(measured.gradients[name], gradient, FP64["rtol"], name)
        if not sequence_parallel:
            torch.testing.assert_close(stopped, _block()._weighted_steps(_states())[0], **FP64)
