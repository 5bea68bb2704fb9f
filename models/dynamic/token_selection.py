"""Selection of the tokens of a routed layer, with its losses and measurements.

Shapes: s sequence, b batch, t tensor size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.dynamic.config import DynamicConfig
from models.dynamic.scores import Predictor, RouterScores
from models.dynamic.token_gather import Selection
from models.dynamic.token_router import RoutingDecision, TokenRouter
from parallel.context import ParallelContext
from parallel.padding import mean_of_tokens
from parallel.regions import local_sequence, sum_over_sequence_ranks


class SelectionOutput(NamedTuple):
    """`selection`: the tokens to compute. `aux`: named entries [b], empty outside of training."""

    selection: Selection
    aux: dict[str, Tensor]


class TokenSelector(nn.Module):
    """Selects tokens by score with `token_router.TokenRouter`, and trains the causal rule that
    selects them outside of training.

        z     = mean(r^2)                       of a linear score
        loss  = mean BCE(p, chosen)             of the predictor's logit p, or of p = r (aux)

    Means are over the tokens of each row.
    Only the loss of the rule `aux` reaches the model; the predictor sees a detached x.
    """

    def __init__(
        self, config: DynamicConfig, *, is_linear: bool, num_routed: int, ctx: ParallelContext
    ) -> None:
        super().__init__()
        self.rule, self.is_linear, self.ctx = config.causal_router, is_linear, ctx
        self.num_routed = num_routed  # the entries of aux are means over these layers
        least = config.causal_threshold
        self.tokens = TokenRouter(
            config.capacity_gamma,
            rule=config.causal_router,
            train_rule=config.routing_train,
            least_logit=math.log(least / (1.0 - least)),
            multiple=config.capacity_multiple,
            momentum=config.tau_momentum,
            ctx=ctx,
        )
        self.predictor = Predictor(config, ctx=ctx) if config.has_predictor else None

    def forward(
        self,
        x: Tensor,
        router_scores: RouterScores,
        forced: Tensor | None,
        lengths: Tensor | None = None,
    ) -> SelectionOutput:
        """x [s/t, b, h], scores and gate [s/t, b], `forced` bool [b, s], `lengths` as in
        TokenInputs."""
        logits = None if self.predictor is None else self.predictor(x)
        routed = self.tokens(router_scores.scores, logits=logits, forced=forced, lengths=lengths)
        aux = self._aux(router_scores, logits, routed, lengths) if self.training else {}
        return SelectionOutput(routed.selection, aux)

    def decide(self, x: Tensor, router_scores: RouterScores, forced: Tensor | None) -> Tensor:
        """Select among tokens that continue a sequence: bool [b, s]."""
        logits = None if self.predictor is None else self.predictor(x)
        return self.tokens.decide(router_scores.scores, logits=logits, forced=forced)

    def _aux(
        self,
        router_scores: RouterScores,
        logits: Tensor | None,
        routed: RoutingDecision,
        lengths: Tensor | None,
    ) -> dict[str, Tensor]:
        means = partial(row_means, lengths=lengths, ctx=self.ctx)
        entries = {
            "causal_fraction": routed.fraction,
            "causal_recall": routed.recall,
            "score_std": routed.spread,
            "gate_mean": means(router_scores.gate.detach()),
        }
        if self.is_linear:
            entries["router_z_loss"] = means(router_scores.scores.square())
        if self.rule == "aux":
            logits = router_scores.scores
        if logits is not None:
            targets = local_sequence(routed.chosen.T, ctx=self.ctx).to(logits.dtype)
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            entries["router_loss"] = means(losses)
        return {name: entry / self.num_routed for name, entry in entries.items()}


def row_means(x: Tensor, *, ctx: ParallelContext, lengths: Tensor | None = None) -> Tensor:
    """Mean over the tokens of each row, from every rank's tokens [s/t, b] -> [b] on every rank.
    `lengths` as in TokenInputs, without sequence parallelism."""
    if lengths is not None:
        return mean_of_tokens(x, lengths)
    ranks = ctx.tensor.size if ctx.sequence_parallel else 1
    return sum_over_sequence_ranks(x.mean(dim=0) / ranks, ctx=ctx)
