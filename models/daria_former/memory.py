"""Attention over memory slots that are retrieved once per segment.

The tokens of a document are cut into segments of C. When a stride of tokens is complete its keys
and values are pooled into one slot (small strides: working memory, large ones: episodic memory);
learned slots (persistent memory) are always available. The tokens of a segment read the `top_k`
slots that score highest for the mean query of the previous segment, so that retrieval depends on
the past alone and is the same in training, prefill and decoding. Slots are pooled once
and never again.

Sources: pooled keys and values as a branch of attention (arXiv 2502.11089, 1911.05507).
Shapes: s sequence, b batch, n query heads, g key/value heads, r = n / g, d head dimension, m slots,
c segments, K = top_k.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.daria_former.cache import MemoryCache, Retrieved, Slots, cut
from parallel.decisions import ScoreError, error_of_largest
from parallel.precision import at_least_fp32
from parallel.recompute import replay_decision

# Maximum number of scores in memory while slots are selected.
_SCORES_AT_A_TIME = 1 << 24
# The least logit that a retrieved slot is given relative to the best one.
_LEAST_BIAS = -30.0


class MemoryLayout(NamedTuple):
    """Sizes of the memory levels: lengths in tokens, capacities in slots."""

    segment_len: int
    working_stride: int
    episodic_stride: int
    working_slots: int
    episodic_slots: int
    top_k: int

    def levels(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(stride, capacity) of working and of episodic memory."""
        return (
            (self.working_stride, self.working_slots),
            (self.episodic_stride, self.episodic_slots),
        )

    def new_cache(self) -> MemoryCache:
        """Empty state; each level keeps what a rollback by a segment needs."""
        strides = tuple(stride for stride, _ in self.levels())
        reaches = tuple(c + self.segment_len // s for s, c in self.levels())
        return MemoryCache(self.segment_len, strides, reaches)


class Tokens(NamedTuple):
    """Inputs of the memory path per token: queries [b, n, s, d] before their gain, keys and values
    [b, g, s, d], and anchors, the pooling logits, [b, g, s]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    anchors: Tensor


def memory_attention(
    tokens: Tokens,
    *,
    fixed: Slots,
    query_gain: Tensor,
    initial_query: Tensor,
    layout: MemoryLayout,
    cache: MemoryCache | None = None,
    training: bool = False,
) -> Tensor:
    """The readout [b, n, s, d] of rows that are one document; with `cache` they continue it.

    `fixed`: the persistent slots. `query_gain` [n, d] scales queries. `initial_query` [g, d]: the
    query of the first segment.
    `training`: see `retrieve`.
    """
    segment, length = layout.segment_len, tokens.keys.shape[2]
    start = 0 if cache is None else cache.length
    first, opened = divmod(start, segment)
    num_closed = (opened + length) // segment
    whole = tokens if cache is None else _joined(tokens, cache, opened)
    closed = Tokens(*(cut(x, 0, num_closed * segment) for x in whole))
    num_segments = -(-(opened + length) // segment)
    if cache is not None and num_segments == 1 and cache.retrieved_for == first:
        retrieved = cache.retrieved
        if num_closed:
            _close_segments(closed, layout, query_gain, initial_query, cache)
    else:
        known = _close_segments(closed, layout, query_gain, initial_query, cache)
        queries = known.queries[:, :, :num_segments]
        visible = _visible(known, first, num_segments, first + num_closed, layout)
        slots = concatenated([*known.levels, fixed])
        visible = F.pad(visible, (0, fixed.keys.shape[2]), value=True)
        retrieved = retrieve(queries, slots, visible, top_k=layout.top_k, training=training)
        if cache is not None:
            last = num_segments - 1
            cache.retrieved, cache.retrieved_for = retrieved.segments(last, last + 1), first + last
    assert retrieved is not None
    parts, done = [], 0
    for stop in _segment_boundaries(opened, length, segment):
        begin, end = (opened + done) // segment, -(-(opened + stop) // segment)
        part = cut(tokens.queries, done, stop)
        parts.append(read(part, retrieved.segments(begin, end), query_gain))
        done = stop
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def packed_memory_attention(
    tokens: Tokens,
    positions: Tensor,
    *,
    fixed: Slots,
    query_gain: Tensor,
    initial_query: Tensor,
    layout: MemoryLayout,
    training: bool = False,
) -> Tensor:
    """The readout [b, n, s, d] of rows that hold several documents, each with its own memory.

    `positions` [b, s] count from 0 in every document. Shapes depend on s alone: slots and segments
    are found by where they end, and as many are computed as could possibly be complete.
    """
    batch, _, length, _ = tokens.queries.shape
    segment = layout.segment_len
    opening = initial_query.expand(batch, -1, -1).unsqueeze(2)
    always = positions.new_ones((1, fixed.keys.shape[2]), dtype=torch.bool)
    for_first = retrieve(opening, fixed, always, top_k=layout.top_k, training=training)
    in_first = read(tokens.queries, for_first, query_gain)
    if length <= segment:
        return in_first
    complete = _CompleteRuns.of(positions, segment)
    blocks = complete.tokens()
    queries = _mean_query(
        _take(tokens.queries, blocks), query_gain, segment=segment, groups=fixed.keys.shape[1]
    )
    levels, visible = [], []
    for stride, capacity in layout.levels():
        slots = _CompleteRuns.of(positions, stride)
        taken = Tokens(*(_take(x, slots.tokens()) for x in tokens))
        levels.append(pool(taken, stride))
        visible.append(slots.visible_at(complete.ends, positions, capacity))
    everything = concatenated([*levels, fixed])
    visible.append(always.expand(batch, complete.ends.shape[1], -1))
    seen = torch.cat(visible, dim=-1).unsqueeze(1)
    retrieved = retrieve(queries, everything, seen, top_k=layout.top_k, training=training)
    # The block after each complete segment; the part beyond its document is discarded.
    following = (blocks + segment).clamp(max=length - 1)
    after = read(_take(tokens.queries, following), retrieved, query_gain)
    offset = positions.long() % segment
    previous = complete.number_at(torch.arange(length, device=offset.device) - offset - 1)
    after = _take(after, (previous.clamp(min=0) * segment + offset))
    return torch.where((positions < segment)[:, None, :, None], in_first, after)


def pool(tokens: Tokens, stride: int) -> Slots:
    """One slot per stride: `k = sum_i w_i k_i`, `v = sum_i w_i v_i`, w = softmax(anchors)."""
    weights = at_least_fp32(tokens.anchors.unflatten(2, (-1, stride))).softmax(dim=-1)
    weights = weights.to(tokens.keys.dtype).unsqueeze(-1)
    # Not products of matrices, of which there would be one for every few tokens.
    strides = (x.unflatten(2, (-1, stride)) for x in (tokens.keys, tokens.values))
    return Slots(*((weights * x).sum(dim=-2) for x in strides))


def retrieve(
    queries: Tensor, slots: Slots, visible: Tensor, *, top_k: int, training: bool = False
) -> Retrieved:
    """The `top_k` visible slots for each query: [b, g, c, d] and `visible` [c, m] or [b, 1, c, m].

    A slot's logit gets `max(-30, rho - max rho)`, rho = q k / sqrt(d), which is how the query
    learns what to retrieve. Selection is in fp32, so that it is the same at any precision of k.
    With `training` it is a decision that two runs may compare (parallel.decisions).
    """
    scale = 1.0 / math.sqrt(queries.shape[-1])
    error_for = partial(_error_for, queries, slots.keys, visible) if training else None
    chosen = replay_decision(lambda: _select(queries, slots.keys, visible, top_k), error_for)
    indices, found = (each.transpose(0, 1) for each in chosen)
    keys, values = (_gather_slots(x, indices) for x in slots)
    if indices.shape[-1] == 0:
        bias = at_least_fp32(queries).new_zeros(indices.shape)
    else:
        scores = (at_least_fp32(queries).unsqueeze(-2) * at_least_fp32(keys)).sum(-1) * scale
        best = scores.masked_fill(~found, -torch.inf).amax(dim=-1, keepdim=True)
        best = best.masked_fill(~found.any(dim=-1, keepdim=True), 0.0)
        bias = (scores - best).clamp(min=_LEAST_BIAS).masked_fill(~found, -torch.inf)
    return Retrieved(F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1)), F.pad(bias, (0, 1)))


def read(queries: Tensor, retrieved: Retrieved, query_gain: Tensor) -> Tensor:
    """Attention of [b, n, c * l, d] queries, l for each of c segments, to what each retrieved."""
    scale = 1.0 / math.sqrt(queries.shape[-1])
    heads = queries.shape[1] // retrieved.keys.shape[1]
    q = queries.unflatten(2, (retrieved.keys.shape[2], -1))
    # Scaled keys are far fewer than scaled scores.
    scores = torch.matmul(q, scaled_for_heads(retrieved.keys, scale * query_gain).mT)
    bias = retrieved.bias.unsqueeze(-2).repeat_interleave(heads, dim=1)
    weights = (at_least_fp32(scores) + bias).softmax(dim=-1).to(q.dtype)
    return torch.matmul(weights, retrieved.values.repeat_interleave(heads, dim=1)).flatten(2, 3)


def scaled_for_heads(keys: Tensor, query_gain: Tensor) -> Tensor:
    """`gain_i * k_g` for every query head i and its key head g: keys [b, g, ..., m, d], gain [n, d]
    -> [b, n, ..., m, d]. Queries then need no gain."""
    gain = query_gain.to(keys.dtype).unflatten(0, (keys.shape[1], -1))
    gain = gain.view(*gain.shape[:2], *([1] * (keys.dim() - 3)), gain.shape[-1])
    return (keys.unsqueeze(2) * gain).flatten(1, 2)


def _joined(tokens: Tokens, cache: MemoryCache, opened: int) -> Tokens:
    """The open segment's tokens and the new ones; the cache then holds both."""
    return Tokens(*(h.extended(x, opened) for h, x in zip(cache.tokens, tokens, strict=True)))


class _SegmentState(NamedTuple):
    """State available to the segments of a call: the query of each (one more than are complete, the
    first from before the call), and the slots of each level."""

    queries: Tensor
    levels: list[Slots]


def _close_segments(
    closed: Tokens,
    layout: MemoryLayout,
    query_gain: Tensor,
    initial: Tensor,
    cache: MemoryCache | None,
) -> _SegmentState:
    """Pool the complete segments of a call; a cache then keeps what later segments can see."""
    batch, groups = closed.keys.shape[:2]
    queries = _mean_query(closed.queries, query_gain, segment=layout.segment_len, groups=groups)
    if cache is not None and cache.summaries.length:
        before = cache.summaries.last(1).clone()
    else:
        before = initial.expand(batch, -1, -1).unsqueeze(2).to(queries.dtype)
    levels = [pool(closed, stride) for stride, _ in layout.levels()]
    if cache is not None:
        cache.summaries.append(queries)
        levels = [
            Slots(*(h.extended(x, capacity) for h, x in zip(streams, slots, strict=True)))
            for streams, slots, (_, capacity) in zip(
                cache.levels, levels, layout.levels(), strict=True
            )
        ]
    return _SegmentState(torch.cat((before, queries), dim=2), levels)


def _visible(
    known: _SegmentState, first: int, num_segments: int, num_closed: int, layout: MemoryLayout
) -> Tensor:
    """Mask of the slots visible to each segment from `first` on, bool [c, m]: the newest that were
    complete when it began. `num_closed` segments are complete by now."""
    device = known.queries.device
    index = torch.arange(first, first + num_segments, device=device).unsqueeze(1)
    visible = []
    for slots, (stride, capacity) in zip(known.levels, layout.levels(), strict=True):
        per_segment, count = layout.segment_len // stride, slots.keys.shape[2]
        number = torch.arange(count, device=device) + num_closed * per_segment - count
        stop = index * per_segment
        visible.append((number < stop) & (number >= stop - capacity))
    return torch.cat(visible, dim=1)


def _mean_query(queries: Tensor, query_gain: Tensor, *, segment: int, groups: int) -> Tensor:
    """Mean over a segment and over the heads that share keys: [b, n, c * C, d] -> [b, g, c, d]."""
    means = queries.unflatten(2, (-1, segment)).mean(dim=3)
    scaled = means * query_gain.to(queries.dtype).unsqueeze(1)
    return scaled.unflatten(1, (groups, -1)).mean(dim=2)


def concatenated(levels: list[Slots]) -> Slots:
    batch = max(level.keys.shape[0] for level in levels)
    parts = zip(*(level for level in levels), strict=True)
    return Slots(*(torch.cat([x.expand(batch, -1, -1, -1) for x in part], dim=2) for part in parts))


class _Chosen(NamedTuple):
    """Slot numbers int64 [g, b, c, K], and whether each is visible. Heads come first: tensor ranks
    have parts of them, and decisions of ranks are put together along the first dimension."""

    indices: Tensor
    found: Tensor


@torch.no_grad()
def _select(queries: Tensor, keys: Tensor, visible: Tensor, top_k: int) -> _Chosen:
    batch, groups, num_segments, _ = queries.shape
    num_slots = keys.shape[2]
    keys = at_least_fp32(keys).mT
    rows = max(1, _SCORES_AT_A_TIME // max(1, batch * groups * num_slots))
    if torch.compiler.is_exporting():  # for any batch
        rows = num_segments
    chosen, found = [], []
    for start in range(0, num_segments, rows):
        part = at_least_fp32(queries[:, :, start : start + rows])
        seen = visible[..., start : start + rows, :]
        scores = torch.matmul(part, keys).masked_fill_(~seen, -torch.inf)
        best = scores.topk(min(top_k, num_slots), dim=-1)
        chosen.append(best.indices)
        found.append(best.values > -torch.inf)
    indices, seen = torch.cat(chosen, dim=2), torch.cat(found, dim=2)
    return _Chosen(indices.transpose(0, 1), seen.transpose(0, 1))


@torch.no_grad()
def _error_for(queries: Tensor, keys: Tensor, visible: Tensor, other: _Chosen) -> ScoreError:
    """The error of the scores with which `other` is selected (parallel.decisions)."""
    scores = torch.matmul(at_least_fp32(queries), at_least_fp32(keys).mT)
    if not scores.shape[-1]:
        return ScoreError(scores.new_zeros(()), scores.new_ones(()))
    indices, found = (each.transpose(0, 1) for each in other)
    marks = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, found)
    return error_of_largest(scores.masked_fill(~visible, -torch.inf), marks, dim=-1)


def _gather_slots(x: Tensor, indices: Tensor) -> Tensor:
    """[b, g, m, d] at [b, g, c, K] -> [b, g, c, K, d]."""
    x = x.expand(indices.shape[0], -1, -1, -1)
    flat = indices.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, indices.shape[2:])


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """x [b, heads, s, ...] at tokens [b, l]: [b, heads, l, ...]."""
    index = tokens.view(tokens.shape[0], 1, -1, *([1] * (x.dim() - 3)))
    return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))


def _segment_boundaries(opened: int, length: int, segment: int) -> list[int]:
    """Split points of `length` tokens: each piece is part of one segment, or whole segments."""
    head = min((-opened) % segment, length)
    middle = head + (length - head) // segment * segment
    return sorted({head, middle, length} - {0})


class _CompleteRuns(NamedTuple):
    """The complete runs of `size` tokens in packed documents, by where they end.

    `ends` int64 [b, s // size]: last tokens, in order; beyond those of a row some valid token.
    `counts` int64 [b, s]: how many runs have ended at or before a token.
    """

    size: int
    ends: Tensor
    counts: Tensor

    @classmethod
    def of(cls, positions: Tensor, size: int) -> _CompleteRuns:
        batch, length = positions.shape
        is_end = (positions + 1) % size == 0
        counts = is_end.long().cumsum(dim=1)
        most = length // size
        place = torch.where(is_end, counts - 1, most)
        index = torch.arange(length, device=positions.device).expand(batch, -1)
        ends = index.new_full((batch, most + 1), size - 1).scatter(1, place, index)
        return cls(size, ends[:, :most], counts)

    def tokens(self) -> Tensor:
        """The tokens of every run, run after run: [b, (s // size) * size]."""
        offsets = torch.arange(1 - self.size, 1, device=self.ends.device)
        return (self.ends.unsqueeze(-1) + offsets).flatten(1)

    def number_at(self, tokens: Tensor) -> Tensor:
        """The number of the last run that ended at or before each token [b, l]; -1 for none."""
        return self.counts.gather(1, tokens.clamp(min=0)) - 1

    def visible_at(self, tokens: Tensor, positions: Tensor, capacity: int) -> Tensor:
        """Mask of the runs visible as slots to each token [b, l]: complete, and of its document,
        [b, l, m]."""
        stop = self.counts.gather(1, tokens)
        own = (positions.long().gather(1, tokens) + 1) // self.size
        number = torch.arange(self.ends.shape[1], device=tokens.device)
        first = stop - own.clamp(max=capacity)
        return (number < stop.unsqueeze(-1)) & (number >= first.unsqueeze(-1))
