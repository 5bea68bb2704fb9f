"""Attention of whole rows on CPU, merged from parts by the logarithms of their sums.

    O = sum_p exp(l_p - l) O_p,   l = log sum_p exp(l_p)

over parts p of a query's keys, O_p being their attention and l_p the log of the sum of their
exponentiated scores. Backward gives each part the merged O and l, from which its kernel makes the
weights of the whole softmax: `exp(score - l)`. That is exact, and needs no gradient of l_p.
Source: arXiv 2205.14135, section 3.1; 2310.01889.

Shapes: s places, b batch, n query heads, g key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.common.cache import KeysValues
from models.dart.attention import Blocks, context_mask, own_mask, reach
from parallel.precision import at_least_fp32

# Queries of a tile, and keys of a part that has a mask.
QUERY_TILE, KEY_TILE = 128, 512

# Both also return or take the logarithms, which F.scaled_dot_product_attention does not.
_part_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_part_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Keys `start` ... `stop - 1` of the context or the own stream; `mask`: bool [1 or b, queries,
    keys], None where every query sees every key."""

    is_own: bool
    start: int
    stop: int
    mask: Tensor | None


def merged_block_attention(
    q: Tensor, context: KeysValues, own: KeysValues, blocks: Blocks
) -> Tensor:
    """Mix the values that every place of whole rows sees: q [b, n, s, d] -> [b, n, s, d].

    `context` and `own`: [b, g, s, d] each. Memory beside the result grows with the tiles' sizes.
    """
    merged: Tensor = _Merged.apply(q, *context, *own, blocks)
    return merged


def parts_of(blocks: Blocks, start: int, stop: int) -> Iterator[Part]:
    """The keys that places start ... stop - 1 see, in parts. The cut does not depend on the text,
    so that neither do the last bits of a place whose keys are the same; parts that nothing sees
    change none."""
    seen, near = reach(blocks, start, stop)
    past = seen[0]
    if blocks.is_aligned:  # everything up to the first block's place
        past = start // blocks.size * blocks.size + 1
        yield Part(False, 0, past, None)
    for is_own, mask_of, (first, last) in (
        (False, context_mask, (past, seen[1])),
        (True, own_mask, near),
    ):
        for begin in range(first, last, KEY_TILE):
            end = min(begin + KEY_TILE, last)
            mask = mask_of(blocks, start, stop, (begin, end))
            # A compiled graph cannot depend on what is in a mask.
            if torch.compiler.is_compiling() or bool(mask.any()):
                yield Part(is_own, begin, end, mask)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, *rest: Any) -> Tensor:
        *keys_values, blocks = rest
        output, logs = torch.empty_like(q), at_least_fp32(q.new_empty(q.shape[:-1]))
        for start, stop in _query_tiles(q.shape[2]):
            queries = q[:, :, start:stop]
            found: tuple[Tensor, Tensor] | None = None
            for part in parts_of(blocks, start, stop):
                mixed = _of_part(queries, _keys_values(keys_values, part), part.mask)
                found = mixed if found is None else _merge(*found, *mixed)
            assert found is not None
            output[:, :, start:stop], logs[:, :, start:stop] = found
        ctx.save_for_backward(q, *keys_values, output, logs)
        ctx.blocks = blocks
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, *keys_values, output, logs = ctx.saved_tensors
        sums = [at_least_fp32(torch.zeros_like(x)) for x in (q, *keys_values)]
        for start, stop in _query_tiles(q.shape[2]):
            queries = slice(start, stop)
            tile = [x[:, :, queries].contiguous() for x in (gradient, q, output, logs)]
            for part in parts_of(ctx.blocks, start, stop):
                keys, values = _keys_values(keys_values, part)
                gradients = _part_attention_backward(
                    *tile[:2], keys, values, *tile[2:], 0.0, False, attn_mask=_bias(part.mask, q)
                )
                into = (sums[0][:, :, queries], *_keys_values(sums[1:], part))
                for total, own in zip(into, gradients, strict=True):
                    total += own
        return *(x.to(q.dtype) for x in sums), None


def _query_tiles(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, QUERY_TILE):
        yield start, min(start + QUERY_TILE, length)


def _keys_values(pairs: list[Tensor], part: Part) -> KeysValues:
    """Views of a part's keys and values, of those of the context and the own stream."""
    keys, values = pairs[2:] if part.is_own else pairs[:2]
    return KeysValues(*(x[:, :, part.start : part.stop] for x in (keys, values)))


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    zeros = torch.zeros(mask.shape, dtype=like.dtype)
    return zeros.masked_fill_(~mask, -torch.inf).unsqueeze(1)


def _of_part(q: Tensor, pair: KeysValues, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The part's attention [b, n, queries, d] and logarithms [b, n, queries], at least in fp32."""
    output, logs = _part_attention(q, *pair, attn_mask=_bias(mask, q))
    if mask is not None:  # the kernel's logarithm of nothing is 0
        logs = logs.masked_fill(~mask.any(dim=-1).unsqueeze(1), -torch.inf)
    return at_least_fp32(output), logs


def _merge(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the keys of two parts, the first or the second of which may be empty."""
    log = torch.logaddexp(log_a, log_b)
    # Of two empty ones too, which a later part fills: -inf - -inf is no number.
    safe = log.masked_fill(log == -torch.inf, 0.0)
    left, right = ((x - safe).exp().unsqueeze(-1) for x in (log_a, log_b))
    return left * a + right * b, log
