"""The block of both families, and the routed block that applies it to chosen tokens.

Shapes: s sequence, b batch, h hidden, k chosen tokens of a row, t tensor size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.common.attention import GatheredTokens, causal_attention, packed_attention
from models.common.cache import KVCache
from models.common.decoder import decoder_attention, decoder_mlp, decoder_norm
from models.common.init import residual_output
from models.common.mlp import SwiGLU
from models.common.rope import RotaryTable, positions_in_segments
from models.dynamic.cache import RaggedKVCache
from models.dynamic.config import DynamicConfig
from models.dynamic.token_gather import Selection, add_tokens, gather_tokens, whole_tokens
from parallel.context import ParallelContext
from parallel.moe import MoELayer
from parallel.sharding import Normal


class BlockOutput(NamedTuple):
    """`delta`: the block's residual update, [s, b, h]. `expert_losses`: fp32 [b, 2], load-balancing
    and z-loss of the block's experts per row; None without experts."""

    delta: Tensor
    expert_losses: Tensor | None = None


class Block(nn.Module):
    """Update by a pre-norm block: `a = attention(norm(x))`, `delta = a + mlp(norm(x + a))`.

    Computed as that sum, not as block(x) - x, which would cancel in bf16. [s, b, h], or
    [s/t, b, h]. With `num_experts` the MLP is a mixture of experts (parallel.moe).
    """

    def __init__(self, config: DynamicConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        self.attention_norm = decoder_norm(config, ctx=ctx)
        self.attention = decoder_attention(config, rotary=rotary, ctx=ctx)
        self.mlp_norm = decoder_norm(config, ctx=ctx)
        self.mlp: SwiGLU | MoELayer
        if config.num_experts is None:
            self.mlp = decoder_mlp(config, ctx=ctx)
        else:
            self.mlp = MoELayer(
                config.hidden_size,
                config.intermediate_size,
                num_experts=config.num_experts,
                top_k=config.experts_per_token,
                capacity_factor=config.expert_capacity_factor,
                renormalize=config.experts_per_token > 1,
                ctx=ctx,
                init=Normal(config.init_std),
                output_init=residual_output(config.init_std, num_layers=config.num_layers),
            )

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        gathered: GatheredTokens | None = None,
        lengths: Tensor | None = None,
    ) -> BlockOutput:
        a = self.attention(
            self.attention_norm(x), positions=positions, cache=cache, gathered=gathered
        )
        u = self.mlp_norm(x + a)
        if not isinstance(self.mlp, MoELayer):
            return BlockOutput(a + self.mlp(u))
        moe = self.mlp(u, lengths)
        losses = torch.stack([moe.load_balancing_loss, moe.z_loss], dim=-1)
        return BlockOutput(a + moe.hidden, losses)


class TokenPositions(NamedTuple):
    """Positions of a call's tokens. `positions`: int32 [b, s], within their documents. `packed`:
    whether rows hold several documents."""

    positions: Tensor
    packed: bool

    @property
    def document_starts(self) -> Tensor:
        """Tokens that begin a document: bool [b, s]."""
        return self.positions == 0


class RoutedBlock(nn.Module):
    """A block applied to chosen tokens only: `y_t = x_t + gate_t delta_t` where t is chosen.

    Attention sees only chosen tokens of the same document, at their positions in the sequence.
    Under sequence parallelism the chosen tokens are gathered on all tensor ranks
    (models.dynamic.token_gather).
    """

    def __init__(self, config: DynamicConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        self.token_share = config.capacity_gamma  # of the tokens; read where stages are cut
        self.block = Block(config, rotary=rotary, ctx=whole_tokens(ctx))

    def new_cache(self, batch_size: int, max_length: int) -> RaggedKVCache:
        """Empty state for generation."""
        self.block.attention.rotary.check(max_length)
        return RaggedKVCache(batch_size, max_length, share=self.token_share)

    def token_positions(
        self, x: Tensor, positions: Tensor | None, cache: RaggedKVCache | None
    ) -> TokenPositions:
        """The positions of the tokens of x [s/t, b, h]; `positions` are given if rows are packed.

        Raises:
            ValueError: there are no rotary angles for that many positions.
        """
        if positions is not None:
            return TokenPositions(positions, packed=True)
        start = 0 if cache is None else cache.length
        length = x.shape[0] * (self.ctx.tensor.size if self.ctx.sequence_parallel else 1)
        self.block.attention.rotary.check(start + length)
        index = torch.arange(start, start + length, dtype=torch.int32, device=x.device)
        return TokenPositions(index.expand(x.shape[1], -1), packed=False)

    def forward(
        self, x: Tensor, gate: Tensor, selection: Selection, token_positions: TokenPositions
    ) -> tuple[Tensor, Tensor | None]:
        """x [s/t, b, h], gate fp32 [s/t, b] -> y [s/t, b, h], and the losses of experts."""
        chosen = gather_tokens(x, selection, ctx=self.ctx)
        gathered = _gathered(selection, token_positions)
        output = self.block(chosen, gathered=gathered, lengths=selection.lengths)
        return add_tokens(x, output.delta, gate, selection, ctx=self.ctx), output.expert_losses

    def forward_cached(
        self, x: Tensor, gate: Tensor, chosen: Tensor, cache: RaggedKVCache
    ) -> Tensor:
        """`forward` for tokens that continue a cached sequence: `chosen` bool [b, s]."""
        step = cache.begin(chosen)
        if step is None:
            return x
        gathered = GatheredTokens(step.positions, partial(cache.attend, step=step))
        if step.some is None:
            delta = self.block(x, gathered=gathered).delta
            return x + (gate.unsqueeze(-1) * delta).to(x.dtype)
        rows, selection = step.some
        tokens = selection.indices.T  # [m, r]
        delta = self.block(x[tokens, rows], gathered=gathered).delta
        assert selection.valid is not None
        weights = (gate[tokens, rows] * selection.valid.T).unsqueeze(-1)
        y = x.clone()
        y[tokens, rows] += (weights * delta).to(x.dtype)
        return y


def _gathered(selection: Selection, token_positions: TokenPositions) -> GatheredTokens:
    positions = token_positions.positions.gather(1, selection.indices)
    if not token_positions.packed:
        return GatheredTokens(positions, causal_attention)
    index = torch.arange(token_positions.positions.shape[1], device=positions.device)
    documents = (index - token_positions.positions).gather(1, selection.indices)
    # Attention stays within a document: number the chosen tokens of each document from 0.
    order = positions_in_segments(documents)
    return GatheredTokens(positions, partial(packed_attention, positions=order))
