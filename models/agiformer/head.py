"""The last layer: latents to the bytes of their patches.

Shapes: s bytes, p patches, b batch, h hidden, P patch size, m head channels, V vocabulary, t tensor
size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.agiformer.cache import HeadCache
from models.agiformer.carry import AgiformerCarry, AgiformerOutput
from models.agiformer.config import AgiformerConfig
from models.agiformer.patches import patch_of_bytes
from parallel.context import ParallelContext
from parallel.cross_entropy import with_logits
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelHead,
    apply_linear,
)
from parallel.sharding import Normal, Sharding, declare


class LocalAutoregressiveHead(nn.Module):
    """A small network for every byte of a patch, which sees the latent and the bytes before it
    there.

        c_{i,k} = W_k z_i + sum_{j<k} T_{k,j}[y_{i,j}],     logits = W_3 gelu(W_2 gelu(c_{i,k}))

    y_{i,j} is byte j of the patch that latent i predicts. All bytes of a patch are computed at once
    in training; in generation one after the other. With byte_head="independent" T is left out: the
    published head, whose bytes of a patch do not know of each other. Tensor ranks share m and V.
    """

    def __init__(self, config: AgiformerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        size, init = config.head_hidden, Normal(config.init_std)
        # Output channel * P + k belongs to place k, so that a rank has all places of its channels.
        self.project = ColumnParallelLinear(
            config.hidden_size, size * config.patch_size, ctx=ctx, init=init
        )
        self.table = None
        pairs = config.patch_size * (config.patch_size - 1) // 2
        if config.byte_head == "causal" and pairs:
            rows = torch.empty(
                pairs * config.vocab_size, size // ctx.tensor.size, device=ctx.device
            )
            self.table = nn.Parameter(rows)
            # As wide as W_k z, a sum over h entries of RMS 1: with rows as narrow as weights a byte
            # is a fraction of the latent, and the head is late to learn what follows it.
            wide = Normal(config.init_std * math.sqrt(config.hidden_size))
            declare(self.table, Sharding(dim=1, full_size=size), wide, role="embedding")
        self.hidden = RowParallelLinear(size, size, ctx=ctx, init=init)
        self.output = VocabParallelHead(config.vocab_size, size, ctx=ctx, init=init)

    def new_cache(self, batch_size: int, max_length: int) -> HeadCache:
        """Empty state for generation."""
        return HeadCache(self.config.patch_size)

    def forward(self, carry: AgiformerCarry, cache: HeadCache | None = None) -> AgiformerOutput:
        tokens, size = carry.tokens, self.config.patch_size
        length = tokens.shape[1]
        start = 0 if cache is None else cache.counter.length
        index = torch.arange(start, start + length, device=tokens.device)
        places = (index if carry.positions is None else carry.positions) % size
        projected = self._projected(carry.hidden, cache)
        if carry.positions is None:
            first = start % size
            c = projected.flatten(0, 1)[first : first + length]
        else:
            patch = patch_of_bytes(carry.positions, patch_size=size)
            rows = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
            c = projected[patch, places.long(), rows].transpose(0, 1)
        before = self._extended(tokens, cache)
        if cache is not None:
            cache.counter.advance(length)
        places = places.long().expand(tokens.shape[0], -1) if places.dim() == 1 else places.long()
        return AgiformerOutput(self.decode(c, before, places), carry.aux, places)

    def decode(self, c: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Logits [s, b, V/t] of bytes at `places` int64 [b, s] from the projections c [s, b, m/t].

        `tokens` int64 [b, P - 2 + s]: the byte before each of them, and P - 2 bytes before those.
        """
        if self.table is not None:
            c = c + self._conditioned(tokens, places).to(c.dtype)
        return apply_linear(self.output, F.gelu(apply_linear(self.hidden, F.gelu(with_logits(c)))))

    def _projected(self, hidden: Tensor, cache: HeadCache | None) -> Tensor:
        """W_k z_i of the patches that the bytes of this call need: [p, P, b, m/t]."""
        if cache is None:
            return self._by_place(apply_linear(self.project, hidden))
        open_patch = 1 if cache.counter.length % self.config.patch_size else 0
        if len(hidden) == 0:
            return self._by_place(cache.projected.last(1))
        projected = apply_linear(self.project, hidden)
        return self._by_place(cache.projected.extended(projected, open_patch))

    def _by_place(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.config.patch_size)).permute(0, 3, 1, 2)

    def _extended(self, tokens: Tensor, cache: HeadCache | None) -> Tensor:
        """The bytes with P - 2 earlier ones; those that there are not are never looked at."""
        earlier = max(0, self.config.patch_size - 2)
        if cache is not None:
            tokens = cache.bytes.extended(tokens, earlier)
            earlier = max(0, earlier - cache.counter.length)
        return F.pad(tokens, (earlier, 0))

    def _conditioned(self, tokens: Tensor, places: Tensor) -> Tensor:
        """`sum_{j<k} T_{k,j}[y_j]` for the bytes at places k: [s, b, m/t]."""
        assert self.table is not None
        size, length = self.config.patch_size, places.shape[1]
        k = places.T
        total = None
        for back in range(size - 1):  # y_j with j = k - 1 - back
            own = tokens[:, size - 2 - back : size - 2 - back + length].T
            pair = k * (k - 1) // 2 + k - 1 - back
            row = (pair * self.config.vocab_size + own).where(k > back, 0)
            part = F.embedding(row, self.table).where((k > back).unsqueeze(-1), 0.0)
            total = part if total is None else total + part
        assert total is not None
        return total
