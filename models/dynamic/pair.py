"""The layer pair of `dtf`: a decision layer for every token, a dynamic layer for chosen ones.

Shapes: s sequence, b batch, h hidden, t tensor size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.common.decoder import decoder_norm
from models.common.rope import RotaryTable
from models.dynamic.block import Block, RoutedBlock, TokenPositions
from models.dynamic.cache import PairCache
from models.dynamic.carry import DTF_AUX, DynamicCarry, with_entries, with_expert_losses
from models.dynamic.config import DTFConfig
from models.dynamic.scores import next_keys
from models.dynamic.surprise import (
    PriorNetwork,
    PriorPrediction,
    Surprise,
    SurpriseRouter,
    local_moving_average,
    moving_average,
    prior_loss,
    squared_error,
)
from parallel.context import ParallelContext
from parallel.precision import at_least_fp32


class DecisionBlockOutput(NamedTuple):
    """`delta` [s/t, b, h]: the block's update of every token. `expected`: the prior's prediction of
    it, None without a prior. `expert_losses`: of the block."""

    delta: Tensor
    expected: PriorPrediction | None
    expert_losses: Tensor | None


class DecisionBlock(nn.Module):
    """A block for every token, and a small prior that predicts its update."""

    def __init__(self, config: DTFConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        self.detaches = config.prior_detach_input
        self.block = Block(config, rotary=rotary, ctx=ctx)
        self.prior_norm, self.prior = None, None
        if config.has_prior:
            self.prior_norm = decoder_norm(config, ctx=ctx)
            self.prior = PriorNetwork(config, ctx=ctx)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None,
        cache: PairCache | None,
        lengths: Tensor | None = None,
    ) -> DecisionBlockOutput:
        """x [s/t, b, h], `lengths` as in TokenInputs."""
        delta, losses = self.block(
            x,
            positions=positions,
            cache=None if cache is None else cache.decision,
            lengths=lengths,
        )
        expected = None
        if self.prior is not None and self.prior_norm is not None:
            expected = self.prior(self.prior_norm(x.detach() if self.detaches else x))
        return DecisionBlockOutput(delta, expected, losses)


class DTFPair(nn.Module):
    """Two layers of the dense stack, of which the second computes only surprising tokens.

        delta = block_0(x),  post = x + delta,  expected = prior(norm(x))
        y_t   = post_t + gate_t block_1(post)_t     for chosen tokens t, else post_t

    One layer of a pipeline, so that the inputs of the decision never cross a stage boundary.
    """

    def __init__(self, config: DTFConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        self.decision = DecisionBlock(config, rotary=rotary, ctx=ctx)
        self.router = SurpriseRouter(config, ctx=ctx)
        self.dynamic = RoutedBlock(config, rotary=rotary, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> PairCache:
        """Empty state for generation."""
        decision = self.decision.block.attention.new_cache(batch_size, max_length)
        dynamic = self.dynamic.new_cache(batch_size, max_length)
        return PairCache(decision, dynamic)

    def forward(self, carry: DynamicCarry, cache: PairCache | None = None) -> DynamicCarry:
        x, router = carry.hidden, self.router
        token_positions = self.dynamic.token_positions(
            x, carry.positions, None if cache is None else cache.dynamic
        )
        delta, expected, losses = self.decision(x, carry.positions, cache, carry.lengths)
        post = x + delta
        numbers = None
        if carry.keys is not None:
            numbers = router.random_numbers(carry.keys, token_positions)
            carry = carry._replace(keys=next_keys(carry.keys))
        surprise = surprise_of(
            delta, expected, token_positions, self.config, cache=cache, ctx=self.ctx
        )
        router_scores, aux = router.score_tokens(post, surprise, numbers, carry.lengths)
        forced = token_positions.document_starts if self.config.force_first else None
        if cache is not None:
            chosen = router.choice.decide(post, router_scores, forced)
            y = self.dynamic.forward_cached(post, router_scores.gate, chosen, cache.dynamic)
            return carry._replace(hidden=y)
        selection, measured = router.choice(post, router_scores, forced, carry.lengths)
        y, more_losses = self.dynamic(post, router_scores.gate, selection, token_positions)
        if not self.training:
            return carry._replace(hidden=y)
        for each in (losses, more_losses):
            carry = with_expert_losses(carry, each, self.config)
        if expected is not None:
            normalised = self.config.prior_loss == "nmse"
            aux["prior_loss"] = prior_loss(
                delta, expected, normalised=normalised, lengths=carry.lengths, ctx=self.ctx
            )
        shares = {name: entry / self.config.num_routed for name, entry in aux.items()}
        return carry._replace(hidden=y, aux=carry.aux + with_entries(DTF_AUX, measured | shares))


def surprise_of(
    delta: Tensor,
    expected: PriorPrediction | None,
    token_positions: TokenPositions,
    config: DTFConfig,
    *,
    cache: PairCache | None = None,
    ctx: ParallelContext,
) -> Surprise | None:
    """Surprise of this rank's tokens [s/t, b]; None if the score does not use it."""
    if config.router_score in ("linear", "random"):
        return None
    if config.router_detach:
        delta = delta.detach()
        if expected is not None:
            expected = expected.detached()
    static = at_least_fp32(delta).square().mean(dim=-1)
    change = None if expected is None else squared_error(delta, expected)
    if cache is None:
        average = local_moving_average(static, token_positions, config, ctx=ctx)
    else:
        average = _continued_average(static, cache, config)
    return Surprise(static, change, average)


def _continued_average(static: Tensor, cache: PairCache, config: DTFConfig) -> Tensor:
    """Moving average for the newest tokens [c, b], from the cached surprises."""
    everything = cache.with_surprise(static.T)
    # Windows at the start of the sequence need its beginning; later ones only W tokens.
    needed = everything[:, -(static.shape[0] + config.ma_window) :]
    index = torch.arange(needed.shape[1], device=static.device).expand_as(needed)
    average = moving_average(needed, index, config.ma_window, skip_first=config.ma_skip_first)
    return average[:, -static.shape[0] :].T
