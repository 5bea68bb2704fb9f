"""Targets of the loss, independent of how a global batch is split into micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.loading.batch import IGNORED_LABEL, Batch
from parallel.context import ParallelContext


class Targets(NamedTuple):
    """Targets of the loss.

    `labels`: int64 [b, s], -100 = not scored. `num_scored`: scalar, see `ModelFamily.loss`.
    """

    labels: Tensor
    num_scored: Tensor | None = None


def count_scored(
    batches: Iterator[Batch], num_batches: int, ctx: ParallelContext
) -> tuple[Iterator[Batch], Tensor]:
    """The next `num_batches` batches, and their mean number of scored tokens over all data ranks.

    Counted on the host before the transfer and summed over data ranks on the device, without a
    synchronisation. Collective over data ranks.
    """
    step = list(itertools.islice(batches, num_batches))
    own = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in step)
    total = torch.full((), float(own), device=ctx.device)
    if ctx.data.size > 1:
        dist.all_reduce(total, group=ctx.data.group)
    return iter(step), total.clamp(min=1) / (num_batches * ctx.data.size)
