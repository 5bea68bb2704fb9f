"""Hebbian memory: linear attention with a scalar decay per head that depends on the input.

    M_t = lambda_t M_{t-1} + k_t v_t^T,   z_t = lambda_t z_{t-1} + k_t,   o_t = q_t M_t / (q_t z_t)

The normaliser is one more column of the values, all ones, so that M holds z as well. Three forms
compute the same: `naive_memory` is the definition and the oracle of the tests; `chunked_memory` has
matrix products and no long chain; `recurrent_memory` is one step. No exponent is positive in any of
them, and all take fp32 or wider.

Shapes: s patches, b batch, n heads, E head dimension, C chunk, c chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The least log lambda: exp(-20) forgets all but 2e-9.
MIN_LOG_DECAY = -20.0
NORMALIZER_EPS = 1e-6


class MemoryInputs(NamedTuple):
    """`q`, `k` [b, n, s, E], not negative; `v` [b, n, s, E + 1] with a last column of ones;
    `log_decay` [b, n, s], at most 0; `starts` bool [b, s] where a patch begins a document, None
    where none does.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    starts: Tensor | None = None


class Remembered(NamedTuple):
    """`values` [b, n, s, E + 1], the read-out and its normaliser. `state` [b, n, E, E + 1]."""

    values: Tensor
    state: Tensor


def positive_features(x: Tensor) -> Tensor:
    """`elu(x) + 1`, without the cancellation that gives 0 for a negative x."""
    return torch.where(x > 0, x + 1.0, x.clamp(max=0.0).exp())


def with_normalizer(v: Tensor) -> Tensor:
    """Values [..., E] with a last column of ones, which sums the weights."""
    return F.pad(v, (0, 1), value=1.0)


def normalized(values: Tensor) -> Tensor:
    """The read-out over its normaliser: [..., E + 1] -> [..., E]."""
    return values[..., :-1] / (values[..., -1:] + NORMALIZER_EPS)


def empty_state(inputs: MemoryInputs) -> Tensor:
    """The state before the first patch: zeros [b, n, E, E + 1]."""
    k, v = inputs.k, inputs.v
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def naive_memory(inputs: MemoryInputs, state: Tensor | None = None) -> Remembered:
    """The definition, patch after patch."""
    state = empty_state(inputs) if state is None else state
    values = []
    for t in range(inputs.q.shape[2]):
        if inputs.starts is not None:
            state = state.masked_fill(inputs.starts[:, t].view(-1, 1, 1, 1), 0.0)
        own = MemoryInputs(*(x[:, :, t : t + 1] for x in inputs[:4]))
        read, state = recurrent_memory(own, state)
        values.append(read)
    return Remembered(torch.cat(values, dim=2), state)


def recurrent_memory(inputs: MemoryInputs, state: Tensor | None) -> Remembered:
    """One patch, s = 1, that begins no document after the first."""
    written = inputs.k.transpose(-1, -2) @ inputs.v
    if state is not None:
        written = written + inputs.log_decay.exp().unsqueeze(-1) * state
    return Remembered(inputs.q @ written, written)


def chunked_memory(inputs: MemoryInputs, state: Tensor | None = None, *, chunk: int) -> Remembered:
    """In chunks of `chunk` patches; time and memory grow with s.

    With B_i the sum of log lambda from the start of a chunk to patch i, and M_in before the chunk:

        A_ij = (q_i . k_j) exp(B_i - B_j)  for j <= i       o_i = sum_j A_ij v_j + exp(B_i) q_i M_in
        M_out = exp(B_C) M_in + sum_j exp(B_C - B_j) k_j v_j^T

    Terms across the start of a document are left out. What remains of earlier documents is in the
    sums B alone, where it cancels but for the rounding of fp64. This is the scalar form of gated
    linear attention (arXiv 2312.06635, 2405.21060).
    """
    length = inputs.q.shape[2]
    inputs, decays = _chunks(inputs, min(chunk, length))
    q, k, v = inputs.q, inputs.k, inputs.v
    inside = (q @ k.transpose(-1, -2)) * decays.between
    summaries = (k * decays.to_end.unsqueeze(-1)).transpose(-1, -2) @ v
    before, state = _across_chunks(summaries, decays.whole, state)
    values = inside @ v + (q * decays.from_start.unsqueeze(-1)) @ before
    return Remembered(values.flatten(2, 3)[:, :, :length], state)


class _Decays(NamedTuple):
    """Products of decays within chunks: `between` two patches [b, n, c, C, C], `from_start` of the
    chunk and `to_end` of it [b, n, c, C], over the `whole` of it [b, n, c]."""

    between: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor


def _chunks(inputs: MemoryInputs, size: int) -> tuple[MemoryInputs, _Decays]:
    """Cut into chunks [b, n, c, C, ...]; the last is filled up with patches that change nothing."""
    missing = -inputs.q.shape[2] % size
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size)) for x in inputs[:3])
    log_decay = F.pad(inputs.log_decay, (0, missing)).unflatten(2, (-1, size))
    # In fp64: the difference of two sums keeps the precision of the terms between them.
    sums = log_decay.double().cumsum(dim=-1)
    between = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    from_start, to_end, whole = sums, sums[..., -1:] - sums, sums[..., -1]
    if inputs.starts is not None:
        starts = F.pad(inputs.starts, (0, missing)).unflatten(1, (-1, size)).unsqueeze(1)
        document = starts.cumsum(dim=-1)  # [b, 1, c, C]; 0 continues the chunk before
        causal = causal & (document.unsqueeze(-1) == document.unsqueeze(-2))
        from_start = from_start.masked_fill(document > 0, -torch.inf)
        to_end = to_end.masked_fill(document != document[..., -1:], -torch.inf)
        whole = whole.masked_fill(document[..., -1] > 0, -torch.inf)
    # Masked before exp: above the diagonal the exponents are positive.
    between = between.masked_fill(~causal, -torch.inf)
    parts = (between, from_start, to_end, whole)
    decays = _Decays(*(part.to(log_decay.dtype).exp() for part in parts))
    return MemoryInputs(q, k, v, log_decay), decays


def _across_chunks(summaries: Tensor, whole: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before every chunk [b, n, c, E, E + 1], and after the last."""
    before = []
    decays = whole.unsqueeze(-1).unsqueeze(-1).unbind(2)
    for decay, summary in zip(decays, summaries.unbind(2), strict=True):
        before.append(torch.zeros_like(summary) if state is None else state)
        state = summary if state is None else torch.addcmul(summary, decay, state)
    assert state is not None
    return torch.stack(before, dim=2), state
