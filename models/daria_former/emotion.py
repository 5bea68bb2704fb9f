"""The emotion state: a small recurrent state per token that modulates the rest of the model.

Shapes: s sequence, b batch, h hidden, E emotion, t tensor size. The state is fp32 and whole on
every tensor rank, [s, b, E], with the gradient convention of parallel.regions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.common.norms import RMSNorm
from models.daria_former.cache import History
from parallel.context import ParallelContext
from parallel.precision import at_least_fp32
from parallel.regions import gather_sequence
from parallel.sharding import Constant, Normal, declare_replicated


class EmotionExpressionLayer(nn.Module):
    """One update site of the emotion state.

        u = norm(x),   [z, c] = W_x u + b + W_e e'        e': the state after the previous site
        e_t = (1 - sigmoid(z_t)) e_{t-1} + sigmoid(z_t) tanh(c_t)            e_{-1} = initial or 0

    A gated linear recurrence (minGRU, arXiv 2410.01201): the gates do not read e_{t-1}, so that all
    tokens are computed at once; they read the state of the previous site instead, which depends on
    it. |e| <= 1. The bias of z starts at -1 ... -5, lifetimes of e^1 ... e^5 tokens (chrono
    initialisation, arXiv 1804.11188). With `mode="gru"` the site is a GRU cell, token after token.

    Under sequence parallelism the gates' inputs are gathered ([s, b, 2E], far less than the hidden
    state) and every rank computes the recurrence.
    """

    def __init__(
        self,
        hidden_dim: int,
        emotion_dim: int,
        *,
        mode: str,
        is_first: bool,
        eps: float,
        init: Normal,
        ctx: ParallelContext,
    ) -> None:
        super().__init__()
        self.ctx, self.mode = ctx, mode
        gates = {"mingru": 2, "gru": 3}[mode]
        self.norm = RMSNorm(hidden_dim, eps=eps, ctx=ctx)
        self.input = _parameter((gates * emotion_dim, hidden_dim), init, ctx)
        if not is_first:
            self.previous = _parameter((gates * emotion_dim, emotion_dim), init, ctx)
        self.write_bias = _parameter((emotion_dim,), _log_lifetimes, ctx)
        self.bias = _parameter(((gates - 1) * emotion_dim,), Constant(0.0), ctx)
        if mode == "gru":
            self.recurrent = _parameter((gates * emotion_dim, emotion_dim), init, ctx)

    def forward(
        self,
        x: Tensor,
        *,
        previous: Tensor | None,
        starts: Tensor | None,
        initial: Tensor | None = None,
        history: History | None = None,
    ) -> Tensor:
        """x [s/t, b, h] and the previous site's state [s, b, E] to this one's.

        `starts` bool [s, b]: tokens that begin a document and so forget. `initial` fp32 [b, E].
        """
        gates = gather_sequence(F.linear(self.norm(x), self.input), ctx=self.ctx)
        gates = at_least_fp32(gates) + at_least_fp32(torch.cat((self.write_bias, self.bias)))
        if previous is not None:
            gates = gates + F.linear(previous, at_least_fp32(self.previous))
        if history is not None and history.length:
            initial = history.last(1).squeeze(0)
        recur = self._mingru if self.mode == "mingru" else self._gru
        state = recur(gates, starts, initial)
        if history is not None:
            history.append(state)
        return state

    def _mingru(self, gates: Tensor, starts: Tensor | None, initial: Tensor | None) -> Tensor:
        update, candidate = gates.chunk(2, dim=-1)
        update = update.sigmoid()
        keep, write = 1.0 - update, update * candidate.tanh()
        if initial is not None:
            write = torch.cat((torch.addcmul(write[:1], keep[:1], initial), write[1:]))
        if starts is not None:
            # The state handed in belongs to what the first document of the row continues.
            keep = keep.masked_fill(starts.unsqueeze(-1), 0.0)
        return scan(keep, write)

    def _gru(self, gates: Tensor, starts: Tensor | None, initial: Tensor | None) -> Tensor:
        """`z, r = sigmoid(x + W e)`, `n = tanh(x + r (W e))`, `e = (1 - z) e + z n` (Cho 2014)."""
        size = gates.shape[-1] // 3
        state = gates.new_zeros(gates.shape[1], size) if initial is None else initial
        recurrent = at_least_fp32(self.recurrent)
        states = []
        for t, token in enumerate(gates.unbind(0)):
            if starts is not None and t > 0:
                state = state.masked_fill(starts[t].unsqueeze(-1), 0.0)
            own = F.linear(state, recurrent)
            update, reset = (token + own)[:, : 2 * size].sigmoid().chunk(2, dim=-1)
            new = (token[:, 2 * size :] + reset * own[:, 2 * size :]).tanh()
            state = (1.0 - update) * state + update * new
            states.append(state)
        return torch.stack(states)


def scan(keep: Tensor, write: Tensor) -> Tensor:
    """`e_t = keep_t e_{t-1} + write_t` with e_{-1} = 0, over the first dimension of [s, b, E] fp32.

    Work grows with s and the longest chain of dependent steps with sqrt(s). Backward is the same
    recurrence from the end; only `keep` and the result are kept for it.
    """
    return _Scan.apply(keep, write)


class _Scan(torch.autograd.Function):
    """`g_t = de_t + keep_{t+1} g_{t+1}`; `dwrite = g`, `dkeep_t = g_t e_{t-1}`."""

    @staticmethod
    def forward(ctx: Any, keep: Tensor, write: Tensor) -> Tensor:
        states = _scanned(keep, write)
        ctx.save_for_backward(keep, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        keep, states = ctx.saved_tensors
        following = torch.cat((keep[1:], torch.zeros_like(keep[:1]))).flip(0)
        gradient = _scanned(following, upstream.flip(0)).flip(0)
        before = torch.cat((torch.zeros_like(states[:1]), states[:-1]))
        return gradient * before, gradient


def _scanned(keep: Tensor, write: Tensor) -> Tensor:
    """The recurrence in chunks of sqrt(s): inside all chunks at once, then over their ends."""
    length = keep.shape[0]
    if length == 1:
        return write.clone()
    chunk = int(length**0.5 + 0.5)
    num_chunks = -(-length // chunk)
    padding = (0, 0) * (keep.dim() - 1) + (0, num_chunks * chunk - length)
    keep = F.pad(keep, padding).unflatten(0, (num_chunks, chunk)).transpose(0, 1).contiguous()
    write = F.pad(write, padding).unflatten(0, (num_chunks, chunk)).transpose(0, 1).contiguous()
    for t in range(1, chunk):  # step t of every chunk
        write[t].addcmul_(keep[t], write[t - 1])
        keep[t].mul_(keep[t - 1])
    incoming = torch.zeros_like(write[0])  # the state before each chunk
    for i in range(1, num_chunks):
        torch.addcmul(write[-1, i - 1], keep[-1, i - 1], incoming[i - 1], out=incoming[i])
    states = torch.addcmul(write, keep, incoming)
    return states.transpose(0, 1).flatten(0, 1)[:length]


def _parameter(shape: tuple[int, ...], init: Any, ctx: ParallelContext) -> nn.Parameter:
    return declare_replicated(nn.Parameter(torch.empty(shape, device=ctx.device)), init, ctx=ctx)


def _log_lifetimes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return -torch.linspace(1.0, 5.0, shape.numel())
