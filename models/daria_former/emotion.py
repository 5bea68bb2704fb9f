"""The emotion state: a small recurrent state per token that modulates the rest of the model.

Shapes: s sequence, b batch, h hidden, E emotion, t tensor size. The state is fp32 and whole on
every tensor rank, [s, b, E], with the gradient convention of parallel.regions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.history import History
from models.common.init import replicated
from models.common.norms import RMSNorm
from models.common.scan import scan
from models.daria_former.config import DariaFormerConfig
from models.daria_former.manual_backward import normed_linear
from parallel.context import ParallelContext
from parallel.precision import at_least_fp32
from parallel.regions import gather_sequence
from parallel.sharding import Constant, Normal


class EmotionExpressionLayer(nn.Module):
    """One update site of the emotion state.

        u = norm(x),   [z, c] = W_x u + b + W_e e'        e': the state after the previous site
        e_t = (1 - sigmoid(z_t)) e_{t-1} + sigmoid(z_t) tanh(c_t)            e_{-1} = initial or 0

    A gated linear recurrence (minGRU, arXiv 2410.01201): the gates do not read e_{t-1}, so that all
    tokens are computed at once; they read the state of the previous site instead, which depends on
    it. |e| <= 1. The bias of z starts at -1 ... -5, lifetimes of e^1 ... e^5 tokens (chrono
    initialisation, arXiv 1804.11188). With `esv_mode="gru"` the site is a GRU cell, token after
    token. The first site, `is_first`, has no previous one to read.

    Under sequence parallelism the gates' inputs are gathered ([s, b, 2E], far less than the hidden
    state) and every rank computes the recurrence.
    """

    def __init__(
        self, config: DariaFormerConfig, *, is_first: bool = False, ctx: ParallelContext
    ) -> None:
        super().__init__()
        self.ctx, self.mode = ctx, config.esv_mode
        hidden_dim, emotion_dim = config.hidden_dim, config.emotion_dim
        init = Normal(config.initializer_range)
        gates = {"mingru": 2, "gru": 3}[self.mode]
        self.norm = _ProjectedNorm(hidden_dim, eps=config.norm_eps, ctx=ctx)
        self.input = replicated((gates * emotion_dim, hidden_dim), init, ctx)
        if not is_first:
            self.previous = replicated((gates * emotion_dim, emotion_dim), init, ctx)
        self.write_bias = replicated((emotion_dim,), _log_lifetimes, ctx)
        self.bias = replicated(((gates - 1) * emotion_dim,), Constant(0.0), ctx)
        if self.mode == "gru":
            self.recurrent = replicated((gates * emotion_dim, emotion_dim), init, ctx)

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
        gates = gather_sequence(self.norm(x, self.input), ctx=self.ctx)
        gates = gates + at_least_fp32(torch.cat((self.write_bias, self.bias)))
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


class _ProjectedNorm(RMSNorm):
    """A norm whose result is only multiplied with a matrix."""

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:  # type: ignore[override]
        return normed_linear(x, self.weight, matrix, eps=self.eps)


def _log_lifetimes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return -torch.linspace(1.0, 5.0, shape.numel())
