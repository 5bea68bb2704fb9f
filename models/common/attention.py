"""Causal self-attention with grouped key and value heads.

Shapes: s sequence, b batch, n query heads, g key/value heads, d head dimension, t tensor size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.common.cache import FixedKVCache, KVCache
from models.common.decoder_counts import mean_keys
from models.common.flex import has_kernel, span_attention
from models.common.norms import AllHeadsNorm, HeadNorm
from models.common.rope import RotaryTable, Rotation, rotate
from parallel.context import ParallelContext
from parallel.cpu.widened import is_widened
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    apply_linear,
    project_together,
)
from parallel.sharding import Normal

# Queries that share one mask when attention is not simply causal.
QUERY_BLOCK = 512
_CPU_BLOCK = 256  # of packed rows, where short documents leave the more keys out
_ALIGNMENT = 8  # elements of 2 bytes in the 16 bytes that kernels load at once


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` over the keys up to the query.

    q and the result are [b, n, s, d], k and v [b, g, s, d]; query head i uses key head
    `i // (n / g)`. No s x s matrix is stored.
    """
    return unmasked_attention(q, k, v, causal=True)


def cached_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last s of T positions: q [b, n, s, d], k and v [b, g, T, d]."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == num_keys:
        return causal_attention(q, k, v)
    if num_queries == 1:
        return unmasked_attention(q, k, v)
    blocks = []
    index = torch.arange(num_keys, device=q.device)
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        seen = num_keys - num_queries + stop
        mask = index[:seen] <= index[seen - (stop - start) : seen, None]
        blocks.append(masked_attention(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], mask))
    return torch.cat(blocks, dim=2)


def computed_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(inputs)`; what it keeps for backward is computed again there."""
    if not torch.is_grad_enabled():  # checkpoint would import torch._dynamo: seconds
        return function(*inputs)
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, num_sinks: int = 0
) -> Tensor:
    """Causal attention within each document of a packed row.

    `positions` int32 [b, s] count from 0 in every document. The first `num_sinks` keys are sinks,
    not tokens, and visible to every query: k and v are [b, g, num_sinks + s, d]. Blocks of queries
    are computed one after another and recomputed in backward, so that memory grows with s, not s^2.
    On a CPU keys before the documents of a block are left out, so that time grows with s, too; in
    training on CUDA one kernel leaves them out.
    """
    if _takes_spans(q):
        return span_attention(q, k, v, positions, num_sinks=num_sinks)
    length = q.shape[2]
    block = min(QUERY_BLOCK, _CPU_BLOCK) if q.device.type == "cpu" else QUERY_BLOCK
    index = torch.arange(length, dtype=torch.int32, device=q.device)
    document_starts = index - positions
    sizes = [min(block, length - start) for start in range(0, length, block)]
    # split and cat instead of slices: the gradient of a slice has the size of the whole tensor.
    keys, values = (x.split([num_sinks, *sizes], dim=2) for x in (k, v))
    outputs = []
    for i, queries in enumerate(q.split(sizes, dim=2)):
        start, stop = i * block, i * block + sizes[i]
        starts = document_starts[:, start:stop]
        first = _first_seen(starts) // block
        seen = [0, *range(first + 1, i + 2)]
        outputs.append(
            computed_again(
                _packed_block,
                queries,
                starts,
                index[first * block : stop],
                *(parts[j] for parts in (keys, values) for j in seen),
            )
        )
    return torch.cat(outputs, dim=2)


def _takes_spans(q: Tensor) -> bool:
    """Whether a packed row is one FlexAttention: a kernel is compiled for every shape, of which
    training has few."""
    return torch.is_grad_enabled() and has_kernel(q)


def _first_seen(document_starts: Tensor) -> int:
    """The first key that any of these queries sees; 0 where to look would wait for the device, or
    make a program of these documents alone. numpy reads the memory of a CPU and no other."""
    if document_starts.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    return max(0, int(document_starts.numpy().min()))


def _packed_block(q: Tensor, document_starts: Tensor, index: Tensor, *parts: Tensor) -> Tensor:
    """Attention of the last queries of `index` int32 over keys and values, in `parts`: the sinks,
    then those of `index`."""
    k, v = (torch.cat(x, dim=2) for x in (parts[: len(parts) // 2], parts[len(parts) // 2 :]))
    queries = index[-q.shape[2] :]
    mask = (index >= document_starts.unsqueeze(-1)) & (index <= queries.unsqueeze(-1))
    mask = F.pad(mask, (k.shape[2] - len(index), 0), value=True)
    return masked_attention(q, k, v, mask.unsqueeze(1))


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
    """Causal attention of the last s of T positions, or with `positions` int32 [b, s] (then T = s)
    of all within their documents: q [b, n, s, d], k and v [b, g, T, d]."""
    if positions is None:
        return cached_attention(q, k, v)
    return packed_attention(q, k, v, positions)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, positions: Tensor | None = None
) -> Tensor:
    """Sliding-window attention over the last `window` positions, the query's own included.

    q: the last s of T positions [b, n, s, d]; k and v [b, g, T, d]. With `positions` int32 [b, s]
    (then T = s) attention also stays within the query's document. Time and memory grow with
    s * window.
    """
    num_queries, earlier = q.shape[2], k.shape[2] - q.shape[2]
    if k.shape[2] <= window and positions is None:
        return cached_attention(q, k, v)
    if num_queries == 1:
        k, v = k[:, :, -window:], v[:, :, -window:]
        return unmasked_attention(q, k, v)
    if positions is not None and _takes_spans(q):
        return span_attention(q, k, v, positions, window=window)
    block = min(QUERY_BLOCK, max(window, 64), num_queries)
    reach = -(-(window - 1) // block)  # number of earlier key blocks visible to a query block
    sizes = [earlier] + [min(block, num_queries - i) for i in range(0, num_queries, block)]
    # split and cat instead of slices: the gradient of a slice has the size of the whole tensor.
    keys, values = k.split(sizes, dim=2), v.split(sizes, dim=2)
    index = torch.arange(-earlier, num_queries, device=q.device)
    outputs = []
    for i, queries in enumerate(q.split(sizes[1:], dim=2)):
        first = max(0, i + 1 - reach) if i * block >= window - 1 else 0
        start, stop = i * block, i * block + queries.shape[2]
        seen = slice(sum(sizes[:first]), sum(sizes[: i + 2]))
        mask = _window_mask(index[earlier + start : earlier + stop], index[seen], window)
        if positions is not None:
            beginnings = index[start:stop] - positions[:, start:stop]
            mask = (mask & (index[seen] >= beginnings.unsqueeze(-1))).unsqueeze(1)
        seen_keys = torch.cat(keys[first : i + 2], dim=2)
        outputs.append(
            masked_attention(queries, seen_keys, torch.cat(values[first : i + 2], dim=2), mask)
        )
    return torch.cat(outputs, dim=2)


def _window_mask(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Mask of the key positions visible to each query position."""
    distance = queries.unsqueeze(-1) - keys
    return (distance >= 0) & (distance < window)


def unmasked_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` over all keys, or with s = T over those up to the query."""
    return _attend(q, k, v, is_causal=causal)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` over the keys of a boolean mask [.., s, T]."""
    # The backward pass of cuDNN gives NaN at these numbers of keys with a mask (torch 2.11 to 2.13,
    # pytorch issue 196678).
    if q.device.type == "cuda" and k.shape[2] % 128 == 64:
        k, v, mask = with_hidden_keys(k, v, mask, 64)
    return _attend(q, k, v, attn_mask=mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    dtype = q.dtype
    row_size = q.shape[0] * q.shape[1] * q.shape[3]
    if dtype == torch.bfloat16 and is_widened(q, k, v, row_size=row_size):
        q, k, v = q.float(), k.float(), v.float()
    k, v = _loadable(k), _loadable(v)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask).to(dtype)


def with_hidden_keys(
    k: Tensor, v: Tensor, mask: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`number` more keys that no query sees; neither result nor gradients change."""
    k, v = (F.pad(x, (0, 0, 0, number)) for x in (k, v))
    return k, v, F.pad(mask, (0, number), value=False)


def _loadable(x: Tensor) -> Tensor:
    return x if x.device.type != "cuda" or is_aligned(x) else x.contiguous()


def is_aligned(x: Tensor) -> bool:
    """Whether every row of x begins at a multiple of 16 bytes (of half precision) and is its own.

    Columns of a joined projection may begin elsewhere. Rows that are expanded over the batch have
    stride 0, with which kernels have been wrong (pytorch issue 191937).
    """
    # Dynamo breaks the graph at storage_offset (torch 2.13). Columns that begin elsewhere are then
    # told by their strides: their projection is as wide as all of them.
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    return not offset % _ALIGNMENT and all(
        size == 1 or (stride > 0 and stride % _ALIGNMENT == 0)
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[s, b, heads * d] -> [b, heads, s, d]."""
    heads = x.unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)
    # The attention kernel of the CPU is 15 % slower on strided heads, those of CUDA are not.
    return heads.contiguous() if x.device.type == "cpu" else heads


class GatheredTokens(NamedTuple):
    """Positions and attention function for tokens gathered out of a sequence.

    `positions`: int32 [b, s], for the rotary embedding of their queries and keys.
    `attend(q, k, v)`: their attention with its mask, [b, n, s, d] and [b, g, s, d] to [b, n, s, d].
    """

    positions: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]


def check_heads(ctx: ParallelContext, **counts: int) -> None:
    """Raise ValueError if the tensor size does not divide one of the named numbers of heads."""
    for name, count in counts.items():
        if count % ctx.tensor.size:
            raise ValueError(
                f"{name}={count} is not divisible by parallel.tensor={ctx.tensor.size}; "
                "choose a tensor size that divides it"
            )


class CausalSelfAttention(nn.Module):
    """`y = W_output attention(rotate(W_query x), rotate(W_key x), W_value x)`.

    Input and output [s, b, h] ([s/t, b, h] under sequence parallelism). Tensor ranks share the
    heads: each computes n/t query heads with g/t key and value heads. Scores are divided by
    sqrt(d). `qk_norm_eps`: queries and keys are normalised before they are rotated, with this eps:
    per head, or all heads together with `norm_all_heads`. `window`: a query sees that many
    positions, its own included.

    Raises:
        ValueError: the tensor size does not divide the heads or the key and value heads.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: RotaryTable,
        ctx: ParallelContext,
        init: Normal,
        output_init: Normal,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
        norm_all_heads: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        check_heads(ctx, num_heads=num_heads, num_kv_heads=num_kv_heads)
        self.ctx = ctx
        self.num_heads, self.head_dim, self.window = num_heads, head_dim, window
        self.rotary = rotary
        rotary.on(ctx.device)

        def column(num_rows: int) -> nn.Module:
            return ColumnParallelLinear(hidden_size, num_rows, ctx=ctx, bias=qkv_bias, init=init)

        self.query = column(num_heads * head_dim)
        self.key = column(num_kv_heads * head_dim)
        self.value = column(num_kv_heads * head_dim)
        self.query_norm: AllHeadsNorm | HeadNorm | None = None
        self.key_norm: AllHeadsNorm | HeadNorm | None = None
        self.norm_all_heads = norm_all_heads
        if qk_norm_eps is not None and norm_all_heads:
            self.query_norm = AllHeadsNorm(num_heads, head_dim, eps=qk_norm_eps, ctx=ctx)
            self.key_norm = AllHeadsNorm(num_kv_heads, head_dim, eps=qk_norm_eps, ctx=ctx)
        elif qk_norm_eps is not None:
            self.query_norm = HeadNorm(head_dim, eps=qk_norm_eps, ctx=ctx)
            self.key_norm = HeadNorm(head_dim, eps=qk_norm_eps, ctx=ctx)
        self.output = RowParallelLinear(
            num_heads * head_dim, hidden_size, ctx=ctx, init=output_init
        )

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for this rank's key and value heads.

        Raises:
            ValueError: there are no rotary angles for that many positions.
        """
        self.rotary.check(max_length)
        return KVCache(max_length)

    def flops_per_token(self, seq_length: int) -> float:
        """FLOPs of scores and weighted values, without projections: `4 n d` for each key that a
        query sees on average. Masked work of a kernel is not counted."""
        keys = mean_keys(seq_length, window=self.window)
        return 4.0 * self.num_heads * self.head_dim * keys

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | FixedKVCache | None = None,
        gathered: GatheredTokens | None = None,
    ) -> Tensor:
        """`positions` [b, s] for packed documents; `cache` if x continues a sequence; `gathered`,
        alone, if x holds tokens gathered out of a sequence."""
        q, k, v = self.project(x)
        if gathered is not None:
            rotation = self.rotary.gather(gathered.positions)
        elif isinstance(cache, FixedKVCache):
            rotation = self.rotary.gather(cache.positions)
        else:
            rotation = self.rotation(q, positions, cache)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if gathered is not None:
            return self.project_output(gathered.attend(q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        if isinstance(cache, FixedKVCache):
            return self.project_output(masked_attention(q, k, v, cache.visible(self.window)))
        packed = None if cache is not None else positions
        if self.window is not None:
            mixed = windowed_attention(q, k, v, window=self.window, positions=packed)
        else:
            mixed = attention(q, k, v, packed)
        return self.project_output(mixed)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, n/t, s, d], keys and values [b, g/t, s, d], before rotation."""
        q, k, v = project_together(x, self.query, self.key, self.value)
        if self.norm_all_heads:
            q, k = self._normalised(q, k)
        q, k, v = (split_heads(each, self.head_dim) for each in (q, k, v))
        if not self.norm_all_heads:
            q, k = self._normalised(q, k)
        return q, k, v

    def _normalised(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.query_norm is None or self.key_norm is None:
            return q, k
        return self.query_norm(q), self.key_norm(k)

    def rotation(self, q: Tensor, positions: Tensor | None, cache: KVCache | None) -> Rotation:
        """The rotation of queries and keys [b, heads, s, d] that come after those of the cache."""
        return self.rotary.of(q, positions, start=0 if cache is None else cache.length)

    def project_output(self, mixed: Tensor) -> Tensor:
        """[b, n/t, s, d] -> [s, b, h], [s/t, b, h] under sequence parallelism."""
        return apply_linear(self.output, mixed.permute(2, 0, 1, 3).flatten(2))
