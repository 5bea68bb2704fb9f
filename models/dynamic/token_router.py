"""Token router: selects the tokens of every row that a layer computes, from one score per token.

Training selects the top k tokens of a row, which needs the whole row; the causal rules of
evaluation and generation look at one token alone. Decisions are the same on every tensor rank and
in a recomputed forward pass. They have no gradient; scores learn through the caller's gate.

Shapes: s sequence, b batch, k chosen tokens of a row, t tensor size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.dynamic.token_gather import Selection, chosen_first
from parallel.context import ParallelContext
from parallel.decisions import ScoreError, error_of_largest, error_of_threshold, observed
from parallel.layer_state import kept_in_dtype
from parallel.recompute import count_once, replay_decision

# The causal rules, and the oracle that looks at later tokens.
Rule = Literal["threshold", "predictor", "aux", "topk"]
# Maximum number of tokens in threshold training, relative to the capacity; the lowest are dropped.
THRESHOLD_ROOM = 1.25


def capacity(gamma: float, length: int, *, multiple: int = 1) -> int:
    """`min(s, ceil(gamma s / m) m)`: the number of tokens computed in a row of s tokens.

    Raises:
        ValueError: gamma outside (0, 1], or a multiple below 1.
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"capacity_gamma={gamma} must be above 0 and at most 1; pass a share")
    if multiple < 1:
        raise ValueError(f"capacity_multiple={multiple} must be 1 or more; raise it")
    return min(length, math.ceil(gamma * length / multiple) * multiple)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores of every row, ascending: [b, s] -> int64 [b, k].

    Always exactly k; ties go to the earlier position on every device, which torch.topk does not
    guarantee.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :k].sort(dim=1).values


def gather_or_broadcast(values: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Values [s/t, b] of each rank's tokens, bit for bit equal on all tensor ranks: [b, s].

    Without gradient. Under sequence parallelism an all-gather; otherwise a broadcast from the first
    rank, because replicated activations may differ in the last bit between ranks.
    """
    values = values.detach()
    if ctx.sequence_parallel:
        parts = [torch.empty_like(values) for _ in range(ctx.tensor.size)]
        dist.all_gather(parts, values.contiguous(), group=ctx.tensor.group)
        values = torch.cat(parts)
    elif ctx.tensor.size > 1:
        values = values.clone(memory_format=torch.contiguous_format)
        dist.broadcast(values, group=ctx.tensor.group, group_src=0)
    return values.T.contiguous()


class ScoreThreshold(nn.Module):
    """The threshold `tau` that a fraction gamma of all scores exceeds, averaged over steps.

        a   <- m a + (1 - m) mean over rows of (r_(k) + r_(k+1)) / 2
        o   <- o + (1 - m) (f - k / s) / d
        tau  = a + o

    with r_(k) the k-th largest score of a row, f the fraction of the step's tokens above tau, and d
    the decrease of that fraction per unit of tau, estimated from the scores below r_(k). The offset
    o corrects for differences between rows: their mean quantile is not the quantile of all tokens.
    The first step sets a; before that tau is -inf, so that every token is chosen. fp32 at any
    precision, equal on all ranks, saved with the weights. Source of a: arXiv 2603.11535.
    """

    tau: Tensor
    offset: Tensor

    def __init__(self, *, momentum: float, device: torch.device) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("tau", torch.full((1,), -math.inf, device=device))
        self.register_buffer("offset", torch.zeros(1, device=device))
        # Sums over rows of 1, midpoint, fraction above tau minus k / s, and 1 / d: fp64 [4].
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def observe(self, scores: Tensor, k: int) -> None:
        """Accumulate the rows of a micro-batch, fp32 [b, s]. Rows without a (k+1)-th score are
        ignored, as are rows whose k-th or (k+1)-th score was forced to infinity."""
        length = scores.shape[1]
        if k >= length:
            return
        lower = min(k + (k + 1) // 2, length - 1)
        values = scores.double().topk(lower + 1, dim=1).values
        middle = (values[:, k - 1] + values[:, k]) / 2
        above = observed(
            scores > self.tau, lambda other: error_of_threshold(scores, self.tau, other)
        )
        excess = (above.sum(dim=1) - k) / length
        slope = (values[:, k - 1] - values[:, lower]) * (length / (lower + 1 - k))
        rows = torch.stack((torch.ones_like(middle), middle, excess, slope))
        sums = rows.where(middle.isfinite(), 0.0).sum(dim=1)
        if self._sums.device != sums.device:  # the module has been moved
            self._sums = torch.zeros_like(sums)
        count_once(self._sums, sums)

    def take_sums(self) -> Tensor:
        sums = self._sums.to(self.tau.device)
        self._sums = torch.zeros_like(sums)
        return sums

    def after_step(self, sums: Tensor) -> None:
        middle, excess, slope = (sums[1:] / sums[0]).to(self.tau.dtype).split(1)
        rate, begins = 1.0 - self.momentum, self.tau.isinf()
        moved = self.offset + rate * excess * slope
        offset = torch.where(begins, self.offset, moved)
        average = torch.where(begins, middle, (self.tau - self.offset).lerp(middle, rate))
        saw_rows = sums[:1] > 0
        self.offset.copy_(torch.where(saw_rows, offset, self.offset))
        self.tau.copy_(torch.where(saw_rows, average + offset, self.tau))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(kept_in_dtype(self, fn), recurse)
        return self


class RoutingDecision(NamedTuple):
    """`selection`: the tokens to compute. `chosen`: the same as a mask, bool [b, s].

    `fraction`: the fraction of tokens that the causal rule chooses; `recall`: the fraction of the
    top k among them. Only both together measure how far the rule is from top-k. `spread`: the
    standard deviation of a row's scores. All per row, fp32 [b].
    """

    selection: Selection
    chosen: Tensor
    fraction: Tensor
    recall: Tensor
    spread: Tensor


class TokenRouter(nn.Module):
    """Selects tokens: the top k of a row in training, by a causal rule otherwise.

    * `rule`: "threshold" `score > tau`; "aux" `score > least_logit`, for scores that an auxiliary
      loss trains to be logits; "predictor" `logit > least_logit`, for given logits; "topk": the
      top k of the row, which looks at later tokens: an oracle that cannot generate.
    * `train_rule`: "topk", or "threshold" with at most 1.25 k tokens, those with the highest
      scores.

    The module's training flag selects between the two.
    """

    def __init__(
        self,
        gamma: float,
        *,
        rule: Rule,
        train_rule: Literal["topk", "threshold"],
        least_logit: float,
        multiple: int,
        momentum: float,
        ctx: ParallelContext,
    ) -> None:
        super().__init__()
        self.gamma, self.multiple, self.ctx = gamma, multiple, ctx
        self.rule, self.train_rule, self.least_logit = rule, train_rule, least_logit
        self.threshold = ScoreThreshold(momentum=momentum, device=ctx.device)

    def forward(
        self,
        scores: Tensor,
        *,
        logits: Tensor | None = None,
        forced: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> RoutingDecision:
        """Select from scores [s/t, b] of this rank's tokens; `logits` alike, for the predictor.

        `forced`: bool [b, s], tokens chosen regardless of their score. `lengths`: int64 [b], number
        of tokens in each row, followed by padding; without sequence parallelism.
        """
        choose = self._choose if lengths is None else partial(self._choose_of_rows, lengths)
        routed: RoutingDecision = replay_decision(
            lambda: choose(scores, logits, forced),
            partial(self._error_for, scores, forced) if self.training else None,
        )
        return routed

    def decide(
        self, scores: Tensor, *, logits: Tensor | None = None, forced: Tensor | None = None
    ) -> Tensor:
        """Apply the causal rule to tokens that continue a sequence: bool [b, s].

        Raises:
            ValueError: the rule is topk.
        """
        if self.rule == "topk":
            raise ValueError(
                "causal_router=topk compares a token with later ones, which a generation does not "
                "have; use threshold, predictor or aux"
            )
        return _with_forced(self._causal(scores, logits), forced)

    @torch.no_grad()
    def _choose(
        self, scores: Tensor, logits: Tensor | None, forced: Tensor | None
    ) -> RoutingDecision:
        ranked = gather_or_broadcast(scores, ctx=self.ctx)
        spread = ranked.std(dim=1, correction=0)
        ranked = _with_forced_first(ranked, forced)
        length = ranked.shape[1]
        k = capacity(self.gamma, length, multiple=self.multiple)
        if self.training:
            self.threshold.observe(ranked, k)
        best = top_k(ranked, k)
        among_best = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, best, True)
        causal = among_best
        if self.rule != "topk":
            causal = _with_forced(self._causal(scores, logits, ranked), forced)
        rule = self.train_rule if self.training else self.rule
        if rule == "topk":
            selection, chosen = Selection(best), among_best
        else:
            # All tokens outside of training: the number of chosen ones depends on later tokens, and
            # so would the shapes of the computation, and the last bits of its results.
            room = _room(k, length) if self.training else length
            chosen = self._limit_to_capacity(
                causal if rule == self.rule else ranked > self._tau, ranked, room
            )
            selection = chosen_first(chosen, room)
        recall = (causal & among_best).sum(dim=1) / k
        return RoutingDecision(selection, chosen, causal.float().mean(dim=1), recall, spread)

    def _choose_of_rows(
        self, lengths: Tensor, scores: Tensor, logits: Tensor | None, forced: Tensor | None
    ) -> RoutingDecision:
        """`_choose` for each row separately: padding neither competes nor counts."""
        rows = [
            self._choose(
                scores[:length, row : row + 1],
                None if logits is None else logits[:length, row : row + 1],
                None if forced is None else forced[row : row + 1, :length],
            )
            for row, length in enumerate(lengths.tolist())
        ]
        length = scores.shape[0]
        chosen = torch.cat([F.pad(r.chosen, (0, length - r.chosen.shape[1])) for r in rows])
        sizes = [r.selection.indices.shape[1] for r in rows]
        selection = chosen_first(chosen, max(sizes))
        return RoutingDecision(
            selection._replace(lengths=torch.tensor(sizes, device=lengths.device)),
            chosen,
            *(torch.cat(values) for values in zip(*(r[2:] for r in rows), strict=True)),
        )

    def _error_for(
        self, scores: Tensor, forced: Tensor | None, other: RoutingDecision
    ) -> ScoreError:
        """The error of the scores with which training selects `other` (parallel.decisions)."""
        ranked = _with_forced_first(gather_or_broadcast(scores, ctx=self.ctx), forced)
        indices, valid, _ = other.selection
        marks = torch.ones_like(indices, dtype=torch.bool) if valid is None else valid
        computed = torch.zeros_like(other.chosen).scatter(1, indices, marks)
        if not torch.equal(computed, other.chosen):
            return ScoreError(ranked.new_tensor(math.inf), ranked.new_ones(()))
        if self.train_rule == "topk":
            return error_of_largest(ranked, other.chosen, dim=1)
        length = ranked.shape[1]
        room = _room(capacity(self.gamma, length, multiple=self.multiple), length)
        return error_of_threshold(ranked, self._tau, other.chosen, room=room)

    @property
    def _tau(self) -> Tensor:
        return self.threshold.tau

    def _limit_to_capacity(self, chosen: Tensor, ranked: Tensor, room: int) -> Tensor:
        """Limit `chosen` to the `room` highest-ranked tokens of each row."""
        if room == chosen.shape[1]:
            return chosen
        best = top_k(ranked.masked_fill(~chosen, -math.inf), room)
        return chosen & torch.zeros_like(chosen).scatter_(1, best, True)

    @torch.no_grad()
    def _causal(
        self, scores: Tensor, logits: Tensor | None, ranked: Tensor | None = None
    ) -> Tensor:
        """The causal rule: bool [b, s]. `ranked`: scores made equal on all ranks, if known."""
        if self.rule == "predictor":
            assert logits is not None
            return gather_or_broadcast(logits, ctx=self.ctx) > self.least_logit
        if ranked is None:
            ranked = gather_or_broadcast(scores, ctx=self.ctx)
        return ranked > (self.least_logit if self.rule == "aux" else self._tau)


def _room(k: int, length: int) -> int:
    """The most tokens of a row that threshold training computes."""
    return min(length, math.ceil(THRESHOLD_ROOM * k))


def _with_forced_first(ranked: Tensor, forced: Tensor | None) -> Tensor:
    return ranked if forced is None else ranked.masked_fill(forced, math.inf)


def _with_forced(chosen: Tensor, forced: Tensor | None) -> Tensor:
    return chosen if forced is None else chosen | forced
