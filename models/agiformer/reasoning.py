"""Adaptive computation: a block that is applied to every patch as often as the patch asks for.

Shapes: p patches, b batch, h hidden, M thinking steps, t tensor size. Activations are [p, b, h], or
[p/t, b, h] under sequence parallelism; halting is fp32 or wider, [p/t, b].
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.agiformer.cache import ReasoningCache
from models.agiformer.carry import AUX, AgiformerCarry
from models.agiformer.config import AgiformerConfig
from models.agiformer.patches import used_patches
from models.common.init import replicated, replicated_linear
from models.common.norms import RMSNorm
from parallel.context import ParallelContext
from parallel.decisions import error_of_threshold
from parallel.layers import ColumnParallelLinear, RowParallelLinear, apply_linear
from parallel.precision import at_least_fp32
from parallel.recompute import replay_decision
from parallel.regions import all_reduced, local_sequence, sum_over_sequence_ranks
from parallel.sharding import Constant, Normal


class Halting(NamedTuple):
    """Of every patch: whether it takes this step, the sum of its halting probabilities so far, the
    steps that it has taken, and the remainder of its last one (0 before)."""

    runs: Tensor
    total: Tensor
    steps: Tensor
    remainder: Tensor


class RecurrentReasoningBlock(nn.Module):
    """Up to M steps of one gated feed-forward layer, with adaptive computation time (arXiv
    1603.08983).

        s_0 = norm_f(x),   c = norm(s_{n-1}),   p_n = sigmoid(w_p c + b_p)
        s_n = s_{n-1} + sigmoid(W_g c + b_g) * W_2 gelu(W_1 c)
        N   = the first n with p_1 + ... + p_n >= 1 - eps, at most M;   R = 1 - p_1 - ... - p_{N-1}
        y   = p_1 s_1 + ... + p_{N-1} s_{N-1} + R s_N,   ponder = N + R

    W_2 starts at 0, so the block begins as the norm, and b_p at -1, about three steps. Without a
    cache all M steps are computed and those after N weigh 0: shapes are constant, and ranks take
    the same steps whatever their patches. With a cache a step computes only patches that still run,
    which gives the same y, and none after the last; with tensor ranks it computes all of them until
    none runs.

    soft: `s_n = s_{n-1} + (1 - p_n) ...` and `y = s_M`; none: `y = s_M` without p.
    """

    def __init__(self, config: AgiformerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        hidden, init = config.hidden_size, Normal(config.init_std)
        zero = Constant(0.0)
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps, ctx=ctx)
        self.step_norm = RMSNorm(hidden, eps=config.rms_norm_eps, ctx=ctx)
        self.up = ColumnParallelLinear(hidden, 4 * hidden, ctx=ctx, bias=True, init=init)
        self.down = RowParallelLinear(4 * hidden, hidden, ctx=ctx, bias=True, init=zero)
        self.gate = replicated_linear(hidden, hidden, bias=True, init=init, role="gate", ctx=ctx)
        self.halt = None
        if config.halting != "none":
            self.halt = replicated((1, hidden), zero, ctx, role="gate")
            self.halt_bias = replicated((1,), Constant(-1.0), ctx)

    def new_cache(self, batch_size: int, max_length: int) -> ReasoningCache:
        """No state; in generation the block stops early."""
        return ReasoningCache()

    def forward(self, carry: AgiformerCarry, cache: ReasoningCache | None = None) -> AgiformerCarry:
        if len(carry.hidden) == 0:
            return carry
        s = self.norm(carry.hidden)
        if self.config.halting != "act":
            return carry._replace(hidden=self._all_steps(s))
        if cache is None:
            y, halting = self._weighted_steps(s)
            return carry._replace(hidden=y, aux=carry.aux + self._measured(halting, carry))
        if self.ctx.tensor.size > 1:  # ranks have other patches, and collectives in common
            return carry._replace(hidden=self._weighted_steps(s, may_stop=True)[0])
        return carry._replace(hidden=self._while_running(s))

    def steps(self, carry: AgiformerCarry) -> Tensor:
        """Steps that every patch takes, as the block measures them: [p/t, b]."""
        return self._weighted_steps(self.norm(carry.hidden))[1].steps

    def step(self, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """The update of s [p/t, b, h], and the halting probability [p/t, b]."""
        c = self.step_norm(s)
        gate = apply_linear(self.gate, c).sigmoid()
        update = gate * apply_linear(self.down, F.gelu(apply_linear(self.up, c)))
        if self.halt is None:
            return update, None
        weight, bias = at_least_fp32(self.halt), at_least_fp32(self.halt_bias)
        return update, F.linear(at_least_fp32(c), weight, bias).sigmoid().squeeze(-1)

    def begin(self, s: Tensor) -> Halting:
        """Before the first step of s [p, b, h]."""
        zero = at_least_fp32(s.new_zeros(s.shape[:2]))
        return Halting(torch.ones_like(zero, dtype=torch.bool), zero, zero, zero)

    def halted(self, before: Halting, p: Tensor, n: int) -> tuple[Halting, Tensor]:
        """After step n with probabilities p: the new state, and the weight of the step."""
        total = before.total + p
        enough = 1.0 - self.config.act_epsilon
        is_enough = replay_decision(
            lambda: total.detach() >= enough,
            partial(error_of_threshold, total.detach(), enough) if self.training else None,
        )
        is_last = before.runs if n == self.config.thinking_steps else before.runs & is_enough
        rest = (1.0 - before.total).where(is_last, 0.0)
        weight = torch.where(is_last, rest, p.where(before.runs, 0.0))
        after = Halting(
            before.runs & ~is_last,
            total.where(before.runs, before.total),
            before.steps + before.runs,
            before.remainder + rest,
        )
        return after, weight

    def _all_steps(self, s: Tensor) -> Tensor:
        for _ in range(self.config.thinking_steps):
            update, p = self.step(s)
            s = s + (update if p is None else (1.0 - p).to(s.dtype).unsqueeze(-1) * update)
        return s

    def _weighted_steps(self, s: Tensor, *, may_stop: bool = False) -> tuple[Tensor, Halting]:
        """All steps of all patches; with `may_stop` until none runs on any tensor rank."""
        halting, y = self.begin(s), torch.zeros_like(s)
        for n in range(1, self.config.thinking_steps + 1):
            update, p = self.step(s)
            assert p is not None
            s = s + update
            halting, weight = self.halted(halting, p, n)
            y = y + weight.to(s.dtype).unsqueeze(-1) * s
            if may_stop and not self._any_runs(halting):
                break
        return y, halting

    def _any_runs(self, halting: Halting) -> bool:
        running = halting.runs.any().int()
        return bool(all_reduced(running, dist.ReduceOp.MAX, ctx=self.ctx))

    def _while_running(self, s: Tensor) -> Tensor:
        """`_weighted_steps` of the patches that still run, as rows of a smaller batch."""
        y = torch.zeros_like(s)
        rows, flat = s.flatten(0, 1).unsqueeze(1), y.view(-1, s.shape[-1])
        index = torch.arange(len(rows), device=s.device)
        halting = self.begin(rows)
        for n in range(1, self.config.thinking_steps + 1):
            update, p = self.step(rows)
            assert p is not None
            rows = rows + update
            halting, weight = self.halted(halting, p, n)
            flat.index_add_(0, index, (weight.to(s.dtype).unsqueeze(-1) * rows).squeeze(1))
            running = halting.runs.squeeze(1).nonzero().squeeze(1)
            if len(running) == 0:
                break
            index, rows = index[running], rows[running]
            halting = Halting(*(x[running] for x in halting))
        return y

    def _measured(self, halting: Halting, carry: AgiformerCarry) -> Tensor:
        """Ponder cost and steps of every row, means over its patches, as `aux`."""
        ponder = halting.steps + halting.remainder
        entries = torch.stack((ponder, halting.steps), dim=-1)  # [p/t, b, 2]
        ranks = self.ctx.tensor.size if self.ctx.sequence_parallel else 1
        count: Tensor | int = len(entries) * ranks
        if carry.positions is not None:
            used = used_patches(
                carry.patch_positions, carry.positions, patch_size=self.config.patch_size
            )
            count = used.sum(dim=1, keepdim=True)
            entries = entries * local_sequence(used.T, ctx=self.ctx).unsqueeze(-1)
        means = sum_over_sequence_ranks(entries.sum(dim=0), ctx=self.ctx) / count
        return F.pad(means, (0, len(AUX) - 2))
