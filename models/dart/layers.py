"""The layers of the dart family: embedding of both streams, pair of blocks, head.

Shapes: s sequence, b batch, h hidden, T noise levels, V vocabulary, t tensor size. Activations are
[s, b, h], or [s/t, b, h] under sequence parallelism.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import TokenInputs
from models.common.attention import CausalSelfAttention
from models.common.cache import KeysValues, KVCache
from models.common.counter_rng import normal
from models.common.decoder import (
    decoder_attention,
    decoder_mlp,
    decoder_norm,
    decoder_output,
    decoder_table,
    embed_tokens,
)
from models.common.init import replicated, replicated_linear
from models.common.norms import rms_norm
from models.common.rope import RotaryTable, rotate
from models.dart.attention import Blocks, find_blocks
from models.dart.block_attention import block_attention
from models.dart.cache import EmbeddingCache, HeadCache, PairCache
from models.dart.carry import DARTCarry, DARTOutput
from models.dart.config import DARTConfig
from models.dart.noise import NORMAL, Noise, draw_noise, full_noise
from models.dart.schedule import alphas
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_logits
from parallel.layers import apply_linear, project_together
from parallel.precision import at_least_fp32
from parallel.regions import local_sequence
from parallel.sharding import Constant, Normal

# Channels of the sinusoids of a noise level.
TIME_CHANNELS = 256


class BlockInputs(NamedTuple):
    """A block to denoise behind a cached causal stream.

    `before` int64 [b, 1]: the token at the block's first place. Place j of the block predicts the
    token after it and shows `tokens` int64 [b, B] at the same j except where `hidden` bool [b, B].
    `levels` int64 [b]: 1 ... T.
    """

    before: Tensor
    tokens: Tensor
    hidden: Tensor
    levels: Tensor
    states: Tensor | None = None


class TimeEmbedding(nn.Module):
    """`W_m silu(W_2 silu(W_1 e(t)))` of noise levels: int [...] -> [..., 6 h], 0 at first.

    e: sinusoids of 1000 t = 1000 k / T, of periods from 2 pi to 20000 pi. One output serves all
    blocks, each of which adds its own table (arXiv 2310.00426, section 2.3).
    """

    def __init__(self, config: DARTConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.steps = config.diffusion_steps
        h, init = config.hidden_size, Normal(config.init_std)
        linear = partial(replicated_linear, bias=True, role="gate", ctx=ctx)
        self.inner = linear(TIME_CHANNELS, h, init=init)
        self.outer = linear(h, h, init=init)
        self.modulation = linear(h, 6 * h, init=Constant(0.0))

    def forward(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """`dtype`: of the weights, which quantised layers do not tell."""
        half = TIME_CHANNELS // 2
        # Angles up to 1000 are too coarse in fp32.
        exponents = torch.arange(half, dtype=torch.float64, device=levels.device) / half
        angles = (1000.0 / self.steps * levels).unsqueeze(-1) * 10_000.0**-exponents
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        c = F.silu(apply_linear(self.outer, F.silu(apply_linear(self.inner, waves))))
        return apply_linear(self.modulation, c)


class DARTEmbedding(nn.Module):
    """Token embeddings of the causal stream, and the noised ones of the tokens after them.

    masked: a hidden token is the learned vector `mask`. gaussian: with e of unit variance,
    `sqrt(alpha) e + sqrt(1 - alpha) noise`, and `mask` at level T. Noise is drawn in training
    (models.dart.noise); elsewhere every block is hidden.
    """

    def __init__(self, config: DARTConfig, *, segmented: bool, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.segmented, self.ctx = config, segmented, ctx
        self.salt = 0  # of the noise
        self.tokens = decoder_table(config, ctx=ctx)
        self.mask = replicated((config.hidden_size,), Normal(config.init_std), ctx)
        self.time = TimeEmbedding(config, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> EmbeddingCache:
        return EmbeddingCache()

    def forward(
        self, inputs: TokenInputs | BlockInputs, cache: EmbeddingCache | None = None
    ) -> DARTCarry:
        if isinstance(inputs, BlockInputs):
            return self._block(inputs)
        if inputs.segment_ids is None:
            check_length(self.config, inputs.tokens.shape[1])
        hidden, positions = embed_tokens(self.tokens, inputs, segmented=self.segmented)
        longest = self.config.max_position_embeddings
        if positions is not None and positions.shape[1] > longest and not positions.is_meta:
            check_length(self.config, int(positions.max()) + 1)  # of the longest document
        if self.training and cache is None:
            if inputs.lengths is not None:
                positions = _without_padding(inputs.tokens, inputs.lengths)
            noise = draw_noise(inputs.tokens, positions, config=self.config, salt=self.salt)
        else:
            noise = full_noise(inputs.tokens, positions, config=self.config)
        following = F.pad(inputs.tokens[:, 1:], (0, 1))
        if cache is None:
            levels = torch.arange(self.config.diffusion_steps + 1, device=hidden.device)
            modulation = self.time(levels, self.mask.dtype)
            noise = self._with_positions(noise)
        else:
            cache.length += inputs.tokens.shape[1]
            if cache.modulation is None:
                cache.modulation = self._of_rows(noise.levels[:1, :1])
            modulation = cache.modulation
        noised = self._noised(following, noise)
        return DARTCarry(hidden, noised, modulation, noise.levels, noise.targets, noise.positions)

    def _with_positions(self, noise: Noise) -> Noise:
        """Positions wherever training may hide context, so that the carry has one form."""
        if noise.positions is not None or self.config.p_uncond == 0:
            return noise
        index = torch.arange(noise.levels.shape[1], device=noise.levels.device)
        return noise._replace(positions=index.int().expand_as(noise.levels).contiguous())

    def _block(self, inputs: BlockInputs) -> DARTCarry:
        levels = inputs.levels.int().unsqueeze(1).expand_as(inputs.tokens)
        noise = Noise(levels, inputs.hidden, levels, None, inputs.tokens)
        modulation = self._of_rows(levels[:, :1])
        before = self.tokens(inputs.before).transpose(0, 1)
        if inputs.states is None:
            noised = self._noised(inputs.tokens, noise)
        else:
            noised = inputs.states.transpose(0, 1).to(before.dtype)
            noised = self._masked(inputs.hidden.T, noised)
        return DARTCarry(before, noised, modulation, levels, levels)

    def _of_rows(self, levels: Tensor) -> Tensor:
        """Modulation of rows that have one level each: int [b, 1] -> [1, b, 6 h]."""
        return self.time(levels.T, self.mask.dtype)

    def clean(self, tokens: Tensor) -> Tensor:
        """e of tokens int64 [...], with a variance of 1, at least in fp32: [..., h]."""
        return rms_norm(at_least_fp32(self.tokens(tokens)), None, eps=self.config.rms_norm_eps)

    def _masked(self, hidden: Tensor, own: Tensor) -> Tensor:
        # [s, b, h] also in memory, where the mask would make it [b, s, h].
        return torch.where(hidden.unsqueeze(-1), self.mask.to(own.dtype), own).contiguous()

    def _noised(self, tokens: Tensor, noise: Noise) -> Tensor:
        """The diffusion stream of int64 [b, s]: [s/t, b, h]."""
        own = self.tokens(tokens).transpose(0, 1)
        levels, hidden, keys = (
            local_sequence(x.T, ctx=self.ctx) for x in (noise.levels, noise.hidden, noise.keys)
        )
        if self.config.diffusion_type == "gaussian":
            signal = alphas(self.config, own.device)[levels].unsqueeze(-1)
            epsilon = normal(keys, own.shape[-1], stream=NORMAL)
            clean = rms_norm(at_least_fp32(own), None, eps=self.config.rms_norm_eps)
            own = (signal.sqrt() * clean + (1.0 - signal).sqrt() * epsilon).to(own.dtype)
        return self._masked(hidden, own)


class TrunkBlock(nn.Module):
    """The parts of a decoder's block, which the pair applies to a stream."""

    def __init__(self, config: DARTConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        self.attention_norm = decoder_norm(config, ctx=ctx)
        self.attention = decoder_attention(config, rotary=rotary, ctx=ctx)
        self.mlp_norm = decoder_norm(config, ctx=ctx)
        self.mlp = decoder_mlp(config, ctx=ctx)


class Exchange(nn.Module):
    """`W_x rms(z)`: what a plan adds to the causal stream, 0 at first; [s/t, b, h].

    Every tensor rank holds W_x whole and applies it to its places. With a rank, `W_x = U D`.
    """

    def __init__(self, config: DARTConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        h, size, zero = config.hidden_size, config.exchange_size, Constant(0.0)
        self.down: nn.Module = nn.Identity()
        if size:
            self.down = replicated_linear(h, size, init=Normal(config.init_std), ctx=ctx)
        self.up = replicated_linear(size or h, h, init=zero, ctx=ctx)

    def forward(self, z: Tensor) -> Tensor:
        return apply_linear(self.up, apply_linear(self.down, rms_norm(z, None, eps=self.eps)))


class DARTPair(nn.Module):
    """A diffusion block, a causal block and the exchange between them, R times.

        g1, b1, a1, g2, b2, a2 = modulation of the place's level + table_r
        z = z + (1 + a1) attention_B(norm(z) (1 + g1) + b1, norm(y))
        z = z + (1 + a2) mlp_B(norm(z) (1 + g2) + b2)
        y = y + attention_C(norm(y)),   y = y + mlp_C(norm(y))
        y_i = y_i + [level of i is T] W_x rms(z_i)

    attention_B is that of models.dart.attention; its own keys come from z and those of the context
    from y before this layer, through the same projections. At level T z_i holds tokens before its
    block only, which y_i has read: a plan. With trunk=shared B and C have the same weights.
    """

    def __init__(
        self, config: DARTConfig, *, rotary: RotaryTable, segmented: bool, ctx: ParallelContext
    ) -> None:
        super().__init__()
        self.config, self.segmented, self.ctx = config, segmented, ctx
        self.causal = TrunkBlock(config, rotary=rotary, ctx=ctx)
        self.diffusion = None
        if config.trunk == "dual":
            self.diffusion = TrunkBlock(config, rotary=rotary, ctx=ctx)
        shape = (config.recursions, 6 * config.hidden_size)
        self.table = replicated(shape, Constant(0.0), ctx)
        self.exchange = Exchange(config, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> PairCache:
        """Empty state for generation.

        Raises:
            ValueError: the model has fewer positions.
        """
        check_length(self.config, max_length)
        repeats = range(self.config.recursions)
        return PairCache([[KVCache(max_length) for _ in range(3)] for _ in repeats])

    def forward(self, carry: DARTCarry, cache: PairCache | None = None) -> DARTCarry:
        positions = carry.positions
        if not (self.training or self.segmented):  # nothing is hidden, and rows are plain
            carry = carry._replace(positions=None)
        for repeat in range(self.config.recursions):
            caches = None if cache is None else cache.repeats[repeat]
            carry = self._once(carry, self.table[repeat], caches)
        return carry._replace(positions=positions)

    def _once(self, carry: DARTCarry, table: Tensor, caches: list[Any] | None) -> DARTCarry:
        y, z, block = carry.hidden, carry.noised, self.diffusion or self.causal
        g1, b1, a1, g2, b2, a2 = self._modulation(carry, table)
        attended = self._attend(block, block.attention_norm(z) * (1 + g1) + b1, carry, caches)
        z = z + (1 + a1) * attended
        z = z + (1 + a2) * block.mlp(block.mlp_norm(z) * (1 + g2) + b2)
        causal, own = self.causal, None if caches is None else caches[0]
        y = y + causal.attention(causal.attention_norm(y), positions=carry.positions, cache=own)
        y = y + causal.mlp(causal.mlp_norm(y))
        # Of a block alone only the first place has a causal stream.
        levels = local_sequence(carry.levels.T, ctx=self.ctx)[: len(y)]
        is_plan = (levels == self.config.diffusion_steps).to(y.dtype).unsqueeze(-1)
        y = y + is_plan * self.exchange(z[: len(y)])
        return carry._replace(hidden=y, noised=z)

    def _modulation(self, carry: DARTCarry, table: Tensor) -> tuple[Tensor, ...]:
        """Six tensors [s/t, b, h], or [1, 1 or b, h] where a row has one level."""
        rows = carry.modulation + table
        if rows.dim() == 3:
            return rows.chunk(6, dim=-1)
        levels = local_sequence(carry.levels.T, ctx=self.ctx)
        return F.embedding(levels, rows).chunk(6, dim=-1)

    def _attend(
        self, block: TrunkBlock, x: Tensor, carry: DARTCarry, caches: list[Any] | None
    ) -> Tensor:
        attention = block.attention
        assert isinstance(attention, CausalSelfAttention)
        q, k, v = project_together(x, attention.query, attention.key, attention.value)
        clean = block.attention_norm(carry.hidden)
        context = project_together(clean, attention.key, attention.value)
        first = 0 if caches is None else caches[1].length
        size, rotary, positions = attention.head_dim, attention.rotary, carry.positions
        q, k, v, keys, values = (_split_heads(each, size) for each in (q, k, v, *context))
        q, k = (_rotated(heads, rotary, positions, first + 1) for heads in (q, k))
        seen, own = KeysValues(_rotated(keys, rotary, positions, first), values), KeysValues(k, v)
        earlier = 0
        if caches is not None:
            seen, own, earlier = caches[1].append(*seen), caches[2].append(*own), first
        is_cached = caches is not None
        blocks = self._blocks(carry, first, earlier)
        mixed = block_attention(q, seen, own, blocks, is_cached=is_cached)
        return apply_linear(attention.output, mixed.permute(2, 0, 1, 3).flatten(2))

    def _blocks(self, carry: DARTCarry, first: int, earlier: int) -> Blocks:
        return find_blocks(
            carry.levels < self.config.diffusion_steps,
            carry.positions,
            size=self.config.block_size,
            first=first,
            earlier=earlier,
        )


class DARTHead(nn.Module):
    """Logits of both streams through one matrix, each after its own norm; with a cache those of one
    stream, None for the other."""

    def __init__(self, config: DARTConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.norm = decoder_norm(config, ctx=ctx)
        self.noised_norm = decoder_norm(config, ctx=ctx)
        self.output = decoder_output(config, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> HeadCache:
        return HeadCache()

    def forward(self, carry: DARTCarry, cache: HeadCache | None = None) -> DARTOutput:
        drafts = logits = None
        if cache is None or cache.of_block:
            drafts = vocab_logits(self.output, self.noised_norm(carry.noised))
        if cache is None or not cache.of_block:
            logits = vocab_logits(self.output, self.norm(carry.hidden))
        return DARTOutput(logits, drafts, carry.levels, carry.targets)


def _without_padding(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Positions int32 [b, s] of rows that end in padding, which is a document of its own: a block
    that shows tokens sees the later ones, too."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    ends = lengths.unsqueeze(1)
    return torch.where(index < ends, index, index - ends).int()


def check_length(config: DARTConfig, length: int) -> None:
    """Check that the model has `length` positions.

    Raises:
        ValueError: it has fewer.
    """
    if length > config.max_position_embeddings:
        raise ValueError(
            f"position {length - 1} is beyond max_position_embeddings="
            f"{config.max_position_embeddings}; shorten the sequence or raise "
            "max_position_embeddings"
        )


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[s, b, heads * d] -> [b, heads, s, d]."""
    return x.unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3).contiguous()


def _rotated(x: Tensor, rotary: RotaryTable, positions: Tensor | None, first: int) -> Tensor:
    """Turn heads [b, n, s, d] by their positions, or by first, first + 1 ... in plain rows."""
    if positions is None:
        return rotate(x, rotary.at(x.device, start=first, length=x.shape[2]))
    return rotate(x, rotary.gather(positions + first))
