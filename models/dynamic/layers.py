"""Layers shared by both families, and those of `mod`.

Shapes: s sequence, b batch, h hidden, V vocabulary, t tensor size. Between layers activations are
[s, b, h], or [s/t, b, h] under sequence parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.base import TokenInputs
from models.common.cache import KVCache
from models.common.decoder import decoder_norm, decoder_output, decoder_table, embed_tokens
from models.common.rope import RotaryTable
from models.dynamic.block import Block, RoutedBlock, TokenPositions
from models.dynamic.cache import RaggedKVCache
from models.dynamic.carry import (
    DTF_AUX,
    MOD_AUX,
    DynamicCarry,
    DynamicOutput,
    with_entries,
    with_expert_losses,
)
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.scores import (
    LinearScore,
    RouterScores,
    next_keys,
    random_scores,
    straight_through,
)
from models.dynamic.token_selection import TokenSelector
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_logits
from parallel.precision import fp32_or_wider
from parallel.regions import local_sequence


class DynamicEmbedding(nn.Module):
    """Map token ids to the residual stream, and segment ids to positions."""

    def __init__(
        self, config: MoDConfig | DTFConfig, *, segmented: bool, ctx: ParallelContext
    ) -> None:
        super().__init__()
        self.segmented = segmented
        self.num_aux = len(MOD_AUX if isinstance(config, MoDConfig) else DTF_AUX)
        self.hands_on_keys = config.num_routed > 0 and config.router_score == "random"
        self.tokens = decoder_table(config, ctx=ctx)

    def forward(self, inputs: TokenInputs) -> DynamicCarry:
        hidden, positions = embed_tokens(self.tokens, inputs, segmented=self.segmented)
        return DynamicCarry(
            hidden,
            hidden.new_zeros(
                inputs.tokens.shape[0], self.num_aux, dtype=fp32_or_wider(hidden.dtype)
            ),
            positions,
            inputs.tokens if self.hands_on_keys else None,
            inputs.lengths,
        )


class DenseLayer(nn.Module):
    """`x = x + block(x)` for every token."""

    def __init__(
        self, config: MoDConfig | DTFConfig, *, rotary: RotaryTable, ctx: ParallelContext
    ) -> None:
        super().__init__()
        self.config = config
        self.block = Block(config, rotary=rotary, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Empty state for generation."""
        return self.block.attention.new_cache(batch_size, max_length)

    def forward(self, carry: DynamicCarry, cache: KVCache | None = None) -> DynamicCarry:
        x = carry.hidden
        output = self.block(x, positions=carry.positions, cache=cache, lengths=carry.lengths)
        losses = output.expert_losses if self.training else None
        return with_expert_losses(carry._replace(hidden=x + output.delta), losses, self.config)


class DepthRouter(nn.Module):
    """Router of a `mod` layer: scores, gates and selection of its tokens.

    `r = w . x / rms(x)`, `gate = sigmoid(r)`, r or 1; with router_score=random r is a fixed random
    number and the gate 1.
    """

    def __init__(self, config: MoDConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.gate_fn, self.ctx = config.gate_fn, ctx
        is_linear = config.router_score == "linear"
        self.score = LinearScore(config, ctx=ctx) if is_linear else None
        self.choice = TokenSelector(
            config, is_linear=is_linear, num_routed=config.num_routed, ctx=ctx
        )

    def router_scores(
        self, x: Tensor, keys: Tensor | None, token_positions: TokenPositions
    ) -> RouterScores:
        """Scores and gates of this rank's tokens x [s/t, b, h]."""
        if self.score is None:
            assert keys is not None
            numbers = random_scores(keys, token_positions.positions)
            own = local_sequence(numbers.T, ctx=self.ctx)
            return RouterScores(own, torch.ones_like(own))
        scores = self.score(x)
        if self.gate_fn == "raw":
            return RouterScores(scores, scores)
        gate = scores.sigmoid()
        return RouterScores(scores, straight_through(gate) if self.gate_fn == "st" else gate)


class RoutedLayer(nn.Module):
    """A routed layer: `x_t = x_t + gate_t block(x)_t` for chosen tokens t, x_t for the others."""

    def __init__(self, config: MoDConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        self.config = config
        self.force_first = config.force_first
        self.router = DepthRouter(config, ctx=ctx)
        self.dynamic = RoutedBlock(config, rotary=rotary, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> RaggedKVCache:
        """Empty cache for generation, for computed tokens only."""
        return self.dynamic.new_cache(batch_size, max_length)

    def forward(self, carry: DynamicCarry, cache: RaggedKVCache | None = None) -> DynamicCarry:
        x = carry.hidden
        token_positions = self.dynamic.token_positions(x, carry.positions, cache)
        forced = token_positions.document_starts if self.force_first else None
        router_scores = self.router.router_scores(x, carry.keys, token_positions)
        if carry.keys is not None:
            carry = carry._replace(keys=next_keys(carry.keys))
        if cache is not None:
            chosen = self.router.choice.decide(x, router_scores, forced)
            return carry._replace(
                hidden=self.dynamic.forward_cached(x, router_scores.gate, chosen, cache)
            )
        selection, aux = self.router.choice(x, router_scores, forced, carry.lengths)
        y, losses = self.dynamic(x, router_scores.gate, selection, token_positions)
        total = carry.aux + with_entries(MOD_AUX, aux) if aux else carry.aux
        losses = losses if self.training else None
        return with_expert_losses(carry._replace(hidden=y, aux=total), losses, self.config)


class DynamicHead(nn.Module):
    """Logits `W norm(x)` over this rank's part of the vocabulary: [s, b, ceil(V/t)]."""

    def __init__(self, config: MoDConfig | DTFConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.norm = decoder_norm(config, ctx=ctx)
        self.output = decoder_output(config, ctx=ctx)

    def forward(self, carry: DynamicCarry) -> DynamicOutput:
        return DynamicOutput(vocab_logits(self.output, self.norm(carry.hidden)), carry.aux)
