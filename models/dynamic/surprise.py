"""Surprise-based routing of `dtf`: prior, surprise, criteria and router.

Shapes: s sequence, b batch, h hidden, m intermediate size of the prior, W window, t tensor size.
Surprises are fp32, [s/t, b] for this rank's tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dynamic.block import TokenPositions
from models.dynamic.config import DTFConfig
from models.dynamic.scores import LinearScore, RouterScores, random_scores, straight_through
from models.dynamic.token_selection import TokenSelector, row_means
from parallel.context import ParallelContext
from parallel.layers import ColumnParallelLinear, RowParallelLinear, apply_linear, project_together
from parallel.padding import mean_of_tokens
from parallel.precision import at_least_fp32
from parallel.regions import gather_sequence, local_sequence, sum_over_sequence_ranks
from parallel.sharding import Constant, Normal, declare_replicated

NORM_EPS = 1e-8
LARGEST_LOGVAR = 10.0
KL_CONSTANT = 1.0  # added to the squared error, so that a variance never collapses


class PriorPrediction(NamedTuple):
    """The prior's prediction of the decision layer's update: mean [s/t, b, h], and log variance
    with surprise=kl."""

    mean: Tensor
    logvar: Tensor | None = None

    def detached(self) -> PriorPrediction:
        """Return a copy without gradient."""
        logvar = None if self.logvar is None else self.logvar.detach()
        return PriorPrediction(self.mean.detach(), logvar)


class PriorNetwork(nn.Module):
    """`W_down silu(W_up x)`, with biases, or `W_down (silu(W_gate x) * W_up x)`: [s/t, b, h].

    W_down is initialised to 0, so that predictions start at 0. Tensor ranks share the m channels.
    """

    def __init__(self, config: DTFConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        hidden, size, init = config.hidden_size, config.prior_size, Normal(config.init_std)
        outputs = hidden * (2 if config.surprise == "kl" else 1)
        self.gate = None
        if config.prior_type == "swiglu":
            self.gate = ColumnParallelLinear(hidden, size, ctx=ctx, bias=True, init=init)
        self.up = ColumnParallelLinear(hidden, size, ctx=ctx, bias=True, init=init)
        self.down = RowParallelLinear(size, outputs, ctx=ctx, bias=True, init=Constant(0.0))
        self.hidden_size = hidden

    def forward(self, x: Tensor) -> PriorPrediction:
        if self.gate is None:
            y = apply_linear(self.down, F.silu(apply_linear(self.up, x)))
        else:
            gate, up = project_together(x, self.gate, self.up)
            y = apply_linear(self.down, F.silu(gate) * up)
        if y.shape[-1] == self.hidden_size:
            return PriorPrediction(y)
        mean, logvar = at_least_fp32(y).chunk(2, dim=-1)
        return PriorPrediction(mean, logvar.clamp(-LARGEST_LOGVAR, LARGEST_LOGVAR))


def squared_error(delta: Tensor, expected: PriorPrediction) -> Tensor:
    """`mean_h (delta - mean)^2`, or with a variance
    `mean_h (logvar + ((delta - mean)^2 + c) exp(-logvar)) / 2`: [s/t, b]."""
    square = (at_least_fp32(delta) - expected.mean).square()
    if expected.logvar is None:
        return square.mean(dim=-1)
    scaled = (square + KL_CONSTANT) * (-expected.logvar).exp()
    return 0.5 * (expected.logvar + scaled).mean(dim=-1)


def prior_loss(
    delta: Tensor,
    expected: PriorPrediction,
    *,
    normalised: bool,
    ctx: ParallelContext,
    lengths: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the prior per row, with a detached delta: [b].

    `normalised`: the row's sum of squared errors divided by its sum of delta^2. With a variance the
    negative log-likelihood of `squared_error` instead. `lengths` as in TokenInputs.
    """
    delta = at_least_fp32(delta.detach())
    errors = squared_error(delta, expected)
    if not normalised or expected.logvar is not None:
        return row_means(errors, ctx=ctx, lengths=lengths)
    squares = delta.square().mean(dim=-1)
    if lengths is not None:
        errors, squares = (
            mean_of_tokens(x, lengths).unsqueeze(0) * lengths for x in (errors, squares)
        )
    sums = sum_over_sequence_ranks(torch.stack((errors.sum(dim=0), squares.sum(dim=0))), ctx=ctx)
    return sums[0] / sums[1].clamp(min=NORM_EPS)


def moving_average(surprise: Tensor, positions: Tensor, window: int, *, skip_first: bool) -> Tensor:
    """Mean over the last `window` tokens of a document, the current one included: [b, s] -> [b, s].

        MA_t = (1/W) sum_{j = t-W+1 .. t} D_max(j, start)

    Positions before the document are replaced by its first token; with `skip_first` the first
    token, whose update is an outlier in trained models, is excluded and the second takes its place.
    """
    length = surprise.shape[1]
    index = torch.arange(length, device=surprise.device)
    starts = index - positions.long()
    if skip_first:
        starts = torch.minimum(starts + 1, index)
    first = surprise.gather(1, starts)
    windows = F.pad(surprise, (window - 1, 0)).unfold(1, window, 1)  # [b, s, W], a view
    offsets = torch.arange(1 - window, 1, device=surprise.device)
    inside = index[:, None] + offsets >= starts.unsqueeze(-1)
    return torch.where(inside, windows, first.unsqueeze(-1)).mean(dim=-1)


class Surprise(NamedTuple):
    """`static`: the squared update of the decision layer, `mean_h delta^2`. `change`: its error
    against the prior, None without one. `average`: the moving average of `static`. [s/t, b]."""

    static: Tensor
    change: Tensor | None
    average: Tensor


class Criteria(nn.Module):
    """The expected-change (CE) and unusual-change (CU) criteria and their combination.

        CE = (D_st - D_ch) / n + log o_ce,  a = softplus(beta_ce) CE,  S_CE = sigmoid(a)
        CU = (D_st - m_cu MA) / n,          b = softplus(beta_cu) CU,  S_CU = sigmoid(b)
        score = softplus(a) + softplus(b),  G = S_CE + S_CU - S_CE S_CU = 1 - exp(-score)

    n = MA + 1e-8, or 1. Tokens are ranked by the score, which stays ordered where G rounds to 1.
    o_ce is parametrised by its logarithm, so that it stays positive.
    """

    def __init__(self, config: DTFConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.has_ce = config.router_score in ("vpr", "ce")
        self.has_cu = config.router_score in ("vpr", "cu")
        self.normalised = config.surprise_norm == "ma"
        self.log_o_ce: Tensor | float = math.log(config.ce_criterion_offset_init)
        self.m_cu: Tensor | float = config.cu_detection_multiplier_init

        def scalar(value: float) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(1, device=ctx.device))
            declare_replicated(parameter, Constant(value), ctx=ctx)
            return parameter

        if self.has_ce:
            self.beta_ce = scalar(config.beta_ce_init)
            if config.learn_o_ce:
                self.log_o_ce = scalar(self.log_o_ce)
        if self.has_cu:
            self.beta_cu = scalar(config.beta_cu_init)
            if config.learn_m_cu:
                self.m_cu = scalar(config.cu_detection_multiplier_init)

    def forward(self, surprise: Surprise) -> dict[str, Tensor]:
        """The logits `a` and `b` of the configured criteria, keyed by the names of their means."""
        norm = surprise.average + NORM_EPS if self.normalised else 1.0
        logits = {}
        if self.has_ce:
            assert surprise.change is not None
            criterion = (surprise.static - surprise.change) / norm + _wide(self.log_o_ce)
            logits["s_ce"] = F.softplus(_wide(self.beta_ce)) * criterion
        if self.has_cu:
            criterion = (surprise.static - _wide(self.m_cu) * surprise.average) / norm
            logits["s_cu"] = F.softplus(_wide(self.beta_cu)) * criterion
        return logits


def _wide(value: Tensor | float) -> Any:
    return at_least_fp32(value) if isinstance(value, Tensor) else value


class MeasuredScores(NamedTuple):
    """Router scores, and named measurements [b] of the criteria."""

    router_scores: RouterScores
    aux: dict[str, Tensor]


class SurpriseRouter(nn.Module):
    """Router of a dynamic layer: scores, gates and selection of its tokens."""

    def __init__(self, config: DTFConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        kind = config.router_score
        self.score = LinearScore(config, ctx=ctx) if kind == "linear" else None
        self.criteria = Criteria(config, ctx=ctx) if kind in ("vpr", "ce", "cu") else None
        self.choice = TokenSelector(
            config, is_linear=kind == "linear", num_routed=config.num_routed, ctx=ctx
        )

    def score_tokens(
        self,
        post: Tensor,
        surprise: Surprise | None,
        numbers: Tensor | None,
        lengths: Tensor | None = None,
    ) -> MeasuredScores:
        """Score this rank's tokens: from `post` [s/t, b, h] with a linear score, from the given
        random `numbers` [s/t, b], otherwise from their surprise. `lengths` as in TokenInputs."""
        if numbers is not None:
            return MeasuredScores(RouterScores(numbers, torch.ones_like(numbers)), {})
        if self.score is not None:
            scores = self.score(post)
            return MeasuredScores(RouterScores(scores, self._gate(scores.sigmoid())), {})
        assert surprise is not None
        if self.criteria is None:
            chosen = surprise.static if self.config.router_score == "dst" else surprise.change
            assert chosen is not None
            norm = surprise.average + NORM_EPS if self.config.surprise_norm == "ma" else 1.0
            return MeasuredScores(RouterScores(chosen / norm, torch.ones_like(chosen)), {})
        logits = self.criteria(surprise)
        scores = torch.stack([F.softplus(logit) for logit in logits.values()]).sum(dim=0)
        means = {
            name: row_means(logit.detach().sigmoid(), ctx=self.ctx, lengths=lengths)
            for name, logit in logits.items()
        }
        return MeasuredScores(RouterScores(scores, self._gate(-torch.expm1(-scores))), means)

    def random_numbers(self, keys: Tensor, token_positions: TokenPositions) -> Tensor:
        """The scores of this rank's tokens with router_score=random: [s/t, b]."""
        numbers = random_scores(keys, token_positions.positions)
        return local_sequence(numbers.T, ctx=self.ctx)

    def _gate(self, gate: Tensor) -> Tensor:
        return straight_through(gate) if self.config.gate_fn == "st" else gate


def local_moving_average(
    static: Tensor, token_positions: TokenPositions, config: DTFConfig, *, ctx: ParallelContext
) -> Tensor:
    """Moving average of the surprise over all ranks' tokens, for this rank's tokens [s/t, b];
    without gradient."""
    everything = gather_sequence(static.detach(), ctx=ctx).T
    average = moving_average(
        everything, token_positions.positions, config.ma_window, skip_first=config.ma_skip_first
    )
    return local_sequence(average.T, ctx=ctx)
