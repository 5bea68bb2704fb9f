"""The first layer: bytes to latents.

Shapes: s bytes, p patches, b batch, h hidden, D byte channels, P patch size, K patch kernel, t
tensor size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.agiformer.cache import EncoderCache
from models.agiformer.carry import AUX, AgiformerCarry, dropped
from models.agiformer.config import AgiformerConfig
from models.agiformer.patches import (
    Patches,
    find_patches,
    merged_documents,
    num_packed_patches,
    packed_positions,
)
from models.common.counter_rng import prefix_keys
from models.common.norms import RMSNorm
from parallel.context import ParallelContext
from parallel.layers import RowParallelLinear, apply_linear
from parallel.precision import fp32_or_wider
from parallel.sharding import Normal, Sharding, declare


class ByteTable(nn.Embedding):
    """The byte table [V, D/t]; tensor ranks share its channels, so that a look-up needs no
    collective: int64 [b, s] -> [b, s, D/t], a view of [s, b, D/t]."""

    def __init__(self, config: AgiformerConfig, *, ctx: ParallelContext) -> None:
        size = config.byte_size
        if size % ctx.tensor.size:
            raise ValueError(
                f"byte_dim={size} is not divisible by parallel.tensor={ctx.tensor.size}; choose a "
                "tensor size that divides it"
            )
        super().__init__(config.vocab_size, size // ctx.tensor.size, device=ctx.device)
        channels, init = Sharding(dim=1, full_size=size), Normal(config.init_std)
        declare(self.get_parameter("weight"), channels, init, role="embedding")

    def reset_parameters(self) -> None:
        """Left to parallel.random.initialize, which knows the parameter's name."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.T).transpose(0, 1)


class ByteLatentEncoder(nn.Module):
    """Overlapping patches of bytes: a convolution of kernel K and stride P that sees no later byte.

        latent_i = norm(W [E x_{iP-K+1}, ..., E x_{iP}] + b)          bytes before the document are
        0

    The K - P first bytes of a kernel are the last ones of the patch before ("soft patching").
    Latent i predicts bytes iP + 1 ... iP + P (models.agiformer.patches). Tensor ranks share the
    channels of E and with them the inputs of W; the one collective is that of a row-parallel layer.
    """

    def __init__(self, config: AgiformerConfig, *, segmented: bool, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.segmented, self.ctx = config, segmented, ctx
        init, size = Normal(config.init_std), config.byte_size
        self.tokens = ByteTable(config, ctx=ctx)
        self.mix = RowParallelLinear(
            size * config.patch_kernel, config.hidden_size, ctx=ctx, bias=True, init=init
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> EncoderCache:
        """Empty state for generation.

        Raises:
            ValueError: more bytes than `max_position_embeddings`.
        """
        limit = self.config.max_position_embeddings
        if max_length > limit:
            raise ValueError(
                f"a text of {max_length} bytes is longer than max_position_embeddings={limit}; "
                "raise the setting, on which no weight depends"
            )
        return EncoderCache(self.config.patch_kernel - 1)

    def forward(self, inputs: Any, cache: EncoderCache | None = None) -> AgiformerCarry:
        """TokenInputs, `tokens` int64 [b, s], to the carry."""
        if self.segmented != (inputs.segment_ids is not None):
            raise ValueError(
                f"a model with segmented={self.segmented} was given segment_ids="
                f"{'None' if inputs.segment_ids is None else 'a tensor'}; "
                "build the model to match the data"
            )
        tokens, positions, patches = inputs.tokens, None, None
        if inputs.segment_ids is not None:
            positions, patches = self._packed(inputs.segment_ids)
            windows = self._packed_windows(self._embedded(tokens), patches)
        elif cache is None:
            windows = self.windows(self._embedded(tokens))
        else:
            windows = self._continued(tokens, cache)
        hidden = self.latents(windows)
        keys = None
        if self.config.dropout > 0 and cache is None:  # in evaluation, too: the wire's shapes stay
            keys = self._keys(tokens, positions, patches)
            if self.training:
                hidden = dropped(hidden, keys, self.config.dropout, stream=0, ctx=self.ctx)
        aux = hidden.new_zeros(tokens.shape[0], len(AUX), dtype=fp32_or_wider(hidden.dtype))
        if inputs.segment_ids is not None:
            most = self.config.documents_per_row
            aux[:, -1] = merged_documents(inputs.segment_ids, documents=most)
        return AgiformerCarry(
            hidden, aux, tokens, positions, None if patches is None else patches.positions, keys
        )

    def windows(self, embedded: Tensor, *, first: int = 0, earlier: int = 0) -> Tensor:
        """The kernels of patches that end at byte `first`, first + P, ...: [p, b, D/t K].

        `embedded` [earlier + s, b, D/t]: the bytes, and `earlier` ones before them.
        """
        size, kernel = self.config.patch_size, self.config.patch_kernel
        missing = kernel - 1 - earlier
        padded = F.pad(embedded, (0, 0, 0, 0, missing, 0))[first:]
        if padded.shape[0] < kernel:
            return padded.new_zeros(0, padded.shape[1], padded.shape[2] * kernel)
        return padded.unfold(0, kernel, size).flatten(2)

    def latents(self, windows: Tensor) -> Tensor:
        """`norm(W kernel + b)` of kernels [p, b, D/t K]: [p/t, b, h]."""
        # Under torch.autocast a linear layer returns half precision; the residual stream keeps its
        # own.
        latents: Tensor = self.norm(apply_linear(self.mix, windows).to(windows.dtype))
        return latents

    def _embedded(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [s, b, D/t]."""
        rows: Tensor = self.tokens(tokens)
        return rows.transpose(0, 1)

    def _continued(self, tokens: Tensor, cache: EncoderCache) -> Tensor:
        """The kernels of the patches that end in `tokens`, which follow those in the cache."""
        first = -cache.counter.length % self.config.patch_size
        cache.counter.advance(tokens.shape[1])
        reach = self.config.patch_kernel - 1
        joined = cache.bytes.extended(tokens, reach)
        earlier = joined.shape[1] - tokens.shape[1]
        return self.windows(self._embedded(joined), first=first, earlier=earlier)

    def _packed(self, segment_ids: Tensor) -> tuple[Tensor, Patches]:
        config = self.config
        ranks = self.ctx.tensor.size if self.ctx.sequence_parallel else 1
        positions = packed_positions(segment_ids, documents=config.documents_per_row)
        count = num_packed_patches(config, segment_ids.shape[1], multiple_of=ranks)
        return positions, find_patches(positions, count=count, patch_size=config.patch_size)

    def _packed_windows(self, embedded: Tensor, patches: Patches) -> Tensor:
        """[s, b, D/t] -> [p, b, D/t K]; bytes of another document are 0."""
        size, kernel = self.config.patch_size, self.config.patch_kernel
        back = torch.arange(kernel - 1, -1, -1, device=embedded.device)
        places = patches.ends.unsqueeze(-1) - back  # [b, p, K]
        is_own = back <= (patches.positions * size).unsqueeze(-1)
        rows = torch.arange(embedded.shape[1], device=embedded.device).view(-1, 1, 1)
        taken = embedded[places.clamp(min=0), rows]  # [b, p, K, D/t]
        taken = taken.masked_fill(~is_own.unsqueeze(-1), 0.0)
        return taken.permute(1, 0, 3, 2).flatten(2)

    def _keys(self, tokens: Tensor, positions: Tensor | None, patches: Patches | None) -> Tensor:
        keys = prefix_keys(tokens, positions)
        if patches is None:
            return keys[:, :: self.config.patch_size].contiguous()
        return keys.gather(1, patches.ends)
