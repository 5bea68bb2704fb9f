"""Measurements of an evaluation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cross_entropy import IGNORED_LABEL
from pretrain.engine.train_spec import TrainSpec


class Scores(NamedTuple):
    """`nats`: the sum of the losses of all scored tokens. `group_bits`: the mean bits of a token of
    each of the family's groups (`ModelFamily.score_groups`), without those that have none."""

    nats: float
    group_bits: dict[str, float]


class Scoring:
    """The objective of an evaluation, which also sums the losses of the family's groups."""

    def __init__(self, spec: TrainSpec) -> None:
        self.spec, self._groups = spec, spec.family.score_groups
        self._names = () if self._groups is None else self._groups.names(spec.config.model)
        # Nats and number of the scored tokens of every group.
        shape = (2, len(self._names))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=spec.ctx.device)

    def __call__(self, output: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses of the scored tokens, in nats; `targets`: as in `objective`."""
        labels: Tensor = targets[0]
        losses = self.spec.family.token_losses(output, labels, ctx=self.spec.ctx)
        if self._groups is not None:
            groups = self._groups.of(output).expand_as(labels).T.flatten()
            scored = (labels.T != IGNORED_LABEL).flatten()
            for own, values in zip(self._sums, (losses.flatten(), scored), strict=True):
                own.index_add_(0, groups, values.detach().double())
        zero = torch.zeros((), device=losses.device)
        return losses.sum(), dict.fromkeys(self.spec.loss_names, zero)

    def group_bits(self) -> dict[str, float]:
        """Mean bits of a token of each group, of all data ranks; collective, also over stages, of
        which the last alone has scored."""
        if self._names:
            for axis in (self.spec.ctx.data, self.spec.ctx.pipeline):
                if axis.size > 1:
                    dist.all_reduce(self._sums, group=axis.group)
        totals = zip(self._names, *self._sums.tolist(), strict=True)
        return {name: nats / (math.log(2) * count) for name, nats, count in totals if count}
