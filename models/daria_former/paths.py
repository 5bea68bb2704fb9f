"""The five attention paths.

Shapes: s sequence, b batch, h hidden, n query heads, g key/value heads, d head dimension, P paths,
t tensor size (n and g are this rank's share inside a layer).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.attention import (
    cached_attention,
    causal_attention,
    packed_attention,
    split_heads,
    unmasked_attention,
    windowed_attention,
)
from models.common.cache import KVCache
from models.common.history import History
from models.common.init import row_sharded
from models.common.rope import RotaryTable, Rotation
from models.daria_former.cache import BlockCache, MemoryCache, Slots
from models.daria_former.config import DariaFormerConfig
from models.daria_former.manual_backward import normalised_heads, rotated_heads
from models.daria_former.memory import (
    MemoryLayout,
    Tokens,
    memory_attention,
    packed_memory_attention,
    scaled_for_heads,
)
from parallel.context import ParallelContext
from parallel.layers import ColumnParallelLinear, project_replicated
from parallel.precision import at_least_fp32
from parallel.sharding import Constant, Normal


class Rotaries(NamedTuple):
    """The rotary tables of the two paths that have positions, one object for all layers."""

    local: RotaryTable
    long: RotaryTable

    @classmethod
    def of(cls, config: DariaFormerConfig) -> Rotaries:
        """Tables of a configuration; a scaling factor f stretches both bases by f^(d / (d - 2)).

        The stretch (NTK-aware) is fixed. One that followed the length of the sequence would turn
        keys that are already in a cache.
        """
        d = config.head_size
        stretch = config.rope_scaling_factor ** (d / (d - 2))
        local, long = (
            RotaryTable(d, config.max_seq_len, theta=base * stretch)
            for base in (config.rope_base, config.rope_base_long)
        )
        return cls(local, long)


class Sources(NamedTuple):
    """Sources of a block's attention beside the hidden state; see DariaCarry for shapes."""

    priors: Tensor | None = None
    bank: Tensor | None = None
    modality: Tensor | None = None
    positions: Tensor | None = None
    keys: Tensor | None = None


class PathReadout(NamedTuple):
    """`values` [b, n, s, d] that a path has read, and the `gain` [n, d] by which they are mixed.

    The gain is returned because a parameter is guaranteed to be available only inside the call of
    its module: offloading releases it afterwards.
    """

    values: Tensor
    gain: Tensor


class ContextPath(nn.Module, ABC):
    """One path: `attention(query_gain * q, key_gain * norm(W_k z), W_v z)`.

    q is shared by all paths, keys and values are not (arXiv 2502.11089). Gains are per head, also
    `output_gain`, the scale of the readout in the mix; ranks hold those of their heads. Subclasses
    define z and the attention.
    """

    def __init__(
        self, config: DariaFormerConfig, *, rotaries: Rotaries, ctx: ParallelContext
    ) -> None:
        super().__init__()
        self.config, self.rotaries, self.ctx = config, rotaries, ctx
        hidden, d = config.hidden_dim, config.head_size
        init = Normal(config.initializer_range)
        self.k_proj = ColumnParallelLinear(hidden, config.num_kv_heads * d, ctx=ctx, init=init)
        self.v_proj = ColumnParallelLinear(hidden, config.num_kv_heads * d, ctx=ctx, init=init)
        self.query_gain = row_sharded(config.num_heads, (d,), Constant(1.0), ctx, role="vector")
        self.key_gain = row_sharded(config.num_kv_heads, (d,), Constant(1.0), ctx, role="vector")
        self.output_gain = row_sharded(config.num_heads, (d,), Constant(1.0), ctx, role="vector")

    def token_projections(self) -> list[nn.Module]:
        """The column-parallel layers of the path that are applied to the block's tokens."""
        return [self.k_proj, self.v_proj]

    def forward(
        self,
        queries: Tensor,
        projected: Sequence[Tensor],
        sources: Sources,
        cache: BlockCache | None,
    ) -> PathReadout:
        """Read the path's source: `queries` [b, n, s, d] normalised, `projected` the outputs of
        `token_projections`, [s, b, .] each."""
        return PathReadout(self.attend(queries, projected, sources, cache), self.output_gain)

    @abstractmethod
    def attend(
        self, q: Tensor, projected: Sequence[Tensor], sources: Sources, cache: BlockCache | None
    ) -> Tensor:
        """Attention of q [b, n, s, d], before its gain, to what the path reads: [b, n, s, d]."""

    def keys_values(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Projected [s, b, g * d] each as keys, normalised and scaled, and values [b, g, s, d]."""
        k = normed_heads(keys, self.config)
        k = k * self.key_gain.to(k.dtype).unsqueeze(1)
        return k, split_heads(values, self.config.head_size)

    def rotated(
        self, q: Tensor, projected: Sequence[Tensor], rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two scaled and rotated."""
        k = rotated_heads(normed_heads(projected[0], self.config), self.key_gain, rotation)
        v = split_heads(projected[1], self.config.head_size)
        return rotated_heads(q, self.query_gain, rotation), k, v


class LocalPath(ContextPath):
    """The last `sliding_window_size` tokens, with rotary positions."""

    def new_cache(self) -> tuple[History, History]:
        reach = self.config.sliding_window_size - 1 + self.config.segment_len
        return History(reach, dim=2), History(reach, dim=2)

    def attend(
        self, q: Tensor, projected: Sequence[Tensor], sources: Sources, cache: BlockCache | None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        rotation = self.rotaries.local.of(q, sources.positions, start=start)
        q, k, v = self.rotated(q, projected, rotation)
        window = self.config.sliding_window_size
        if cache is not None and cache.local is not None:
            k, v = (h.extended(x, window - 1) for h, x in zip(cache.local, (k, v), strict=True))
        return windowed_attention(q, k, v, window=window, positions=sources.positions)


class LongPath(ContextPath):
    """All tokens so far, with rotary positions of a longer base, and learned keys and values
    (sinks) that every token sees."""

    def __init__(
        self, config: DariaFormerConfig, *, rotaries: Rotaries, ctx: ParallelContext
    ) -> None:
        super().__init__(config, rotaries=rotaries, ctx=ctx)
        self.num_sinks = config.num_global_tokens
        self.sinks = None
        if self.num_sinks:
            shape, init = (2, self.num_sinks, config.head_size), Normal(config.initializer_range)
            self.sinks = row_sharded(config.num_kv_heads, shape, init, ctx)

    def new_cache(self, max_length: int) -> KVCache:
        """A cache with room for the sinks, which the first tokens put in front of their own."""
        return KVCache(self.num_sinks + max_length)

    def attend(
        self, q: Tensor, projected: Sequence[Tensor], sources: Sources, cache: BlockCache | None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        rotation = self.rotaries.long.of(q, sources.positions, start=start)
        q, k, v = self.rotated(q, projected, rotation)
        long = None if cache is None else cache.long
        if self.sinks is not None and (long is None or long.length == 0):
            sinks = self.sinks.to(k.dtype).expand(k.shape[0], -1, -1, -1, -1).unbind(2)
            k, v = (torch.cat(pair, dim=2) for pair in zip(sinks, (k, v), strict=True))
        if long is not None:
            return cached_attention(q, *long.append(k, v))
        if sources.positions is not None:
            return packed_attention(q, k, v, sources.positions, num_sinks=self.num_sinks)
        # As many queries in front as there are sinks make the mask that of causal attention.
        padded = F.pad(q, (0, 0, self.num_sinks, 0))
        return causal_attention(padded, k, v)[:, :, self.num_sinks :]


class MemoryPath(ContextPath):
    """Slots retrieved once per segment, see models.daria_former.memory; without positions.

    Anchors weigh tokens when they are pooled: `W_a x + segment_gain * sigmoid(segment logit)`, with
    the segment logit of the context router.
    """

    def __init__(
        self, config: DariaFormerConfig, *, rotaries: Rotaries, ctx: ParallelContext
    ) -> None:
        super().__init__(config, rotaries=rotaries, ctx=ctx)
        groups, init = config.num_kv_heads, Normal(config.initializer_range)
        self.anchor = ColumnParallelLinear(
            config.hidden_dim, groups, ctx=ctx, init=init, role="gate"
        )
        self.segment_gain = row_sharded(groups, (), Constant(0.0), ctx)
        self.initial_query = None
        if config.persistent_memory_slots:  # else the first segment has no slots
            # Learned: with a zero query all scores of the first segment would tie.
            self.initial_query = row_sharded(groups, (config.head_size,), Normal(1.0), ctx)
        self.layout = MemoryLayout(
            segment_len=config.segment_len,
            working_stride=config.working_stride,
            episodic_stride=config.episodic_stride,
            working_slots=config.working_memory_slots,
            episodic_slots=config.episodic_memory_slots,
            top_k=config.memory_top_k,
        )

    def new_cache(self) -> MemoryCache:
        return self.layout.new_cache()

    def token_projections(self) -> list[nn.Module]:
        return [self.k_proj, self.v_proj, self.anchor]

    def attend(
        self, q: Tensor, projected: Sequence[Tensor], sources: Sources, cache: BlockCache | None
    ) -> Tensor:
        keys, values, anchor = projected
        assert sources.priors is not None
        worth = at_least_fp32(self.segment_gain) * sources.priors[..., -1:].sigmoid()
        anchors = (at_least_fp32(anchor) + worth).permute(1, 2, 0)
        tokens = Tokens(q, *self.keys_values(keys, values), anchors)
        if self.initial_query is None:
            initial = q.new_zeros(tokens.keys.shape[1], q.shape[-1])
        else:
            initial = self.initial_query.to(q.dtype)
        if cache is None and sources.positions is not None:
            return packed_memory_attention(
                tokens,
                sources.positions,
                fixed=self.persistent_slots(sources),
                query_gain=self.query_gain,
                initial_query=initial,
                layout=self.layout,
                training=self.training,
            )
        return memory_attention(
            tokens,
            fixed=_cached_slots("memory", self.persistent_slots, sources, cache),
            query_gain=self.query_gain,
            initial_query=initial,
            layout=self.layout,
            cache=None if cache is None else cache.memory,
            training=self.training,
        )

    def persistent_slots(self, sources: Sources) -> Slots:
        """Keys and values [1, g, M, d] of the persistent slots, each from a bank of its own."""
        count = self.config.persistent_memory_slots
        if count and sources.bank is not None:
            bank = sources.bank[: 2 * count]
        else:
            bank = self.key_gain.new_zeros((0, 1, self.config.hidden_dim))
        (keys,) = project_replicated(bank[:count], self.k_proj, ctx=self.ctx)
        (values,) = project_replicated(bank[count:], self.v_proj, ctx=self.ctx)
        return Slots(*self.keys_values(keys, values))


class StaticPath(ContextPath):
    """A source of fixed length, and an empty slot of score and value 0."""

    def token_projections(self) -> list[nn.Module]:
        return []

    @abstractmethod
    def source(self, sources: Sources) -> Tensor | None:
        """The hidden vectors to read, [m, b or 1, h], or None."""

    def attend(
        self, q: Tensor, projected: Sequence[Tensor], sources: Sources, cache: BlockCache | None
    ) -> Tensor:
        slots = _cached_slots(type(self).__name__, self.slots, sources, cache)
        # The gain of the queries on the keys, which are far fewer; every head then has its own.
        k = scaled_for_heads(slots.keys, self.query_gain)
        v = slots.values.repeat_interleave(k.shape[1] // slots.values.shape[1], dim=1)
        return unmasked_attention(q, *(x.expand(q.shape[0], -1, -1, -1) for x in (k, v)))

    def slots(self, sources: Sources) -> Slots:
        """Keys and values [b or 1, g, m + 1, d]."""
        source = self.source(sources)
        if source is None:
            source = self.key_gain.new_zeros((0, 1, self.config.hidden_dim))
        k, v = self.keys_values(*project_replicated(source, self.k_proj, self.v_proj, ctx=self.ctx))
        return Slots(F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)))


class PersonaPath(StaticPath):
    """The persona's learned slots."""

    def source(self, sources: Sources) -> Tensor | None:
        return None if sources.bank is None else sources.bank[-self.config.persona_memory_slots :]


class ModalityPath(StaticPath):
    """Encoded images and sound."""

    def source(self, sources: Sources) -> Tensor | None:
        return sources.modality


PATH_CLASSES: dict[str, type[ContextPath]] = {
    "local": LocalPath,
    "long": LongPath,
    "memory": MemoryPath,
    "persona": PersonaPath,
    "modality": ModalityPath,
}


def normed_heads(x: Tensor, config: DariaFormerConfig) -> Tensor:
    """[s, b, heads * d] -> [b, heads, s, d], each normalised if `qk_norm` (arXiv 2010.04245)."""
    x = x.unflatten(-1, (-1, config.head_size))
    if not config.qk_norm:
        return x.permute(1, 2, 0, 3).contiguous()
    return normalised_heads(x, eps=config.norm_eps)


def _cached_slots(
    name: str, make: Callable[[Sources], Slots], sources: Sources, cache: BlockCache | None
) -> Slots:
    """Slots that are projected once per generation."""
    if cache is None:
        return make(sources)
    if name not in cache.static:
        cache.static[name] = make(sources)
    return cache.static[name]
