"""This rank's shard of a parameter partitioned by ZeRO-3, without padding.

DeepSpeed (0.19.8, zero/partition_parameters.py) cuts a flattened parameter into equal partitions.
If the number of ranks does not divide it, the last ones end in padding: uninitialised memory that
is no part of the model. Nothing may read it, and `clear_padding` zeroes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class LocalShard(NamedTuple):
    """Elements of a flattened parameter from `start` on, as a view."""

    start: int
    elements: Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned the parameter over data ranks."""
    return hasattr(parameter, "ds_id")


def local_shard(parameter: Tensor) -> LocalShard:
    """This rank's elements of a parameter: all of them, or its partition under ZeRO-3."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return LocalShard(0, parameter.detach().view(-1))
    flat = partition.detach().view(-1)
    numel: int = parameter.ds_numel  # type: ignore[attr-defined]
    rank: int = parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
    start = min(flat.numel() * rank, numel)
    return LocalShard(start, flat.narrow(0, 0, min(numel - start, flat.numel())))


@torch.no_grad()
def clear_padding(parameters: Iterable[Tensor]) -> None:
    """Zero the padding of parameters that have just been partitioned."""
    for parameter in parameters:
        partition = getattr(parameter, "ds_tensor", None)
        if partition is not None:
            partition.view(-1)[local_shard(parameter).elements.numel() :].zero_()
