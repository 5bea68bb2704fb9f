"""Auxiliary losses, computed inside the layers.

Each is a value per row, [b], and is the same at any layout. Rows are averaged by
`models.base.scored_mean`, so that a step does not depend on its split into micro-batches. Shapes:
s sequence, b batch, h hidden, n heads, d head dimension, P paths, c segments, t tensor size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.norms import rms_norm
from models.daria_former.attention import Attended, MultiContextAttention
from models.daria_former.carry import AUX
from models.daria_former.config import DariaFormerConfig
from parallel.context import ParallelContext
from parallel.layers import project_partial
from parallel.precision import at_least_fp32, fp32_or_wider
from parallel.regions import (
    gather_sequence,
    local_sequence,
    scale_replicated_grad,
    sum_over_sequence_ranks,
    sum_over_tensor_ranks,
)

# A path whose mean gate falls below this is penalised.
LEAST_GATE = 0.02
# Cosine similarity of consecutive hidden states below which there is no penalty.
FREE_SIMILARITY = 0.9


def with_entries(**entries: Tensor) -> Tensor:
    """fp32 [b, len(AUX)] with the given entries [b] and 0 elsewhere."""
    zero = torch.zeros_like(next(iter(entries.values())))
    return torch.stack([at_least_fp32(entries.get(name, zero)) for name in AUX], dim=-1)


def block_measurements(
    attended: Attended,
    x: Tensor,
    attention: MultiContextAttention,
    *,
    config: DariaFormerConfig,
    is_last: bool,
    ctx: ParallelContext,
) -> Tensor:
    """One block's contribution to `aux`: gate balance and mean gates, and in the last block the
    memory loss. x [s/t, b, h] is the block's output."""
    gates = mean_gates(attended.gates, config.num_heads, ctx=ctx)
    shares = (gates.detach() / config.num_layers).unbind(dim=1)
    entries = {f"gate_{path}": share for path, share in zip(config.all_paths, shares, strict=True)}
    entries["gate_loss"] = (LEAST_GATE - gates).relu().sum(dim=1) / config.num_layers
    if is_last and attended.readout is not None:
        path = attention.paths["memory"]
        readout = rms_norm(attended.readout, None, eps=config.norm_eps)
        entries["memory_loss"] = memory_consistency(
            readout * path.output_gain.unsqueeze(1),  # type: ignore[operator]
            x,
            attention.o_proj,
            segment_len=config.segment_len,
            ctx=ctx,
        )
    return with_entries(**entries)


def mean_gates(gates: Tensor, num_heads: int, *, ctx: ParallelContext) -> Tensor:
    """Mean of every path's gate over a row's tokens and all heads: [s, b, n/t, P] -> [b, P]."""
    return sum_over_tensor_ranks(gates.mean(dim=0).sum(dim=1), ctx=ctx) / num_heads


def memory_consistency(
    readout: Tensor,
    x: Tensor,
    output_projection: nn.Module,
    *,
    segment_len: int,
    ctx: ParallelContext,
) -> Tensor:
    """`mean_c (1 - cos(W_o m_c, mean of norm(x) in c))` of every row, the target without gradient.

    Pulls the memory path's readout of a segment, after the output projection, towards the mean
    hidden state of the segment. `readout` [b, n/t, s, d]; segments are counted along the row.
    """
    num_segments = readout.shape[2] // segment_len
    if num_segments == 0:
        return at_least_fp32(x.new_zeros(x.shape[1]))
    complete = num_segments * segment_len
    means = readout[:, :, :complete].unflatten(2, (num_segments, segment_len)).mean(dim=3)
    written = project_partial(means.permute(2, 0, 1, 3).flatten(2), output_projection)
    written = at_least_fp32(sum_over_tensor_ranks(written, ctx=ctx))
    with torch.no_grad():
        target = at_least_fp32(gather_sequence(x, ctx=ctx)[:complete])
        target = F.rms_norm(target, target.shape[-1:]).unflatten(0, (num_segments, segment_len))
        target = target.mean(dim=1)
    return cosine_distance(written, target).mean(dim=0)


def cosine_distance(written: Tensor, target: Tensor) -> Tensor:
    """`1 - cos(x, y)` over the last dimension."""
    return 1.0 - F.cosine_similarity(written, target, dim=-1)


def emotion_smoothness(
    emotion: Tensor, positions: Tensor | None, *, ctx: ParallelContext
) -> Tensor:
    """`mean_t |e_t - e_{t-1}|^2` over a row's tokens that do not begin a document.

    [s, b, E] -> [b].
    """
    steps = (emotion[1:] - emotion[:-1]).square().sum(dim=-1)
    if positions is None:
        mean = steps.sum(dim=0) / max(len(steps), 1)
    else:
        continues = positions.T[1:] > 0
        mean = (steps * continues).sum(dim=0) / continues.sum(dim=0).clamp(min=1)
    return scale_replicated_grad(mean, ctx=ctx)


@torch.no_grad()
def emotion_variance(emotion: Tensor) -> Tensor:
    """Variance over a row's tokens, averaged over channels: [s, b, E] -> [b]. Near 0 the state
    carries no information."""
    return emotion.var(dim=0, correction=0).mean(dim=-1)


def repetition(y: Tensor, positions: Tensor | None, *, ctx: ParallelContext) -> Tensor:
    """`mean_t relu(cos(y_t, y_{t+1}) - 0.9)` over a row's neighbours of one document.

    y [s/t, b, h] -> [b].
    Similar to the contrastive objective of SimCTG (arXiv 2202.06417). Each rank scores the pairs
    that its own tokens begin, so that the result does not depend on the number of ranks.
    """
    firsts = gather_sequence(y[:1], ctx=ctx)  # the first token of every rank
    next_rank = (ctx.tensor.rank + 1) % len(firsts)
    following = firsts[next_rank : next_rank + 1]
    norms = torch.cat((_norms(y), _norms(following)))
    products = torch.cat((_products(y[:-1], y[1:]), _products(y[-1:], following)))
    excess = (products / (norms[:-1] * norms[1:]) - FREE_SIMILARITY).relu()
    length = y.shape[0] * len(firsts)
    counted = excess.new_ones((length, y.shape[1]))
    counted[-1] = 0.0
    if positions is not None:
        counted[:-1] = (positions.T[1:] > 0).to(counted.dtype)
    total = (excess * local_sequence(counted, ctx=ctx)).sum(dim=0)
    return sum_over_sequence_ranks(total, ctx=ctx) / counted.sum(dim=0).clamp(min=1.0)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=fp32_or_wider(x.dtype)).clamp(min=1e-6)


def _products(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, dtype=fp32_or_wider(x.dtype))
