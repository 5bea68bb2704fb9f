"""Agreement between the ranks of a run, over small Python objects."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from parallel.checkpoint.errors import AgreedError, CheckpointError, one_line

T = TypeVar("T")

_ONE_BLOCK = 64  # ranks


class RankGroup(NamedTuple):
    """All ranks of the run, in blocks of consecutive ranks.

    `group`: a gloo group over the ranks of this block; None for a single process. `leaders`: one
    over the first ranks of all blocks, if this is one of them and there is more than one block.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    leaders: dist.ProcessGroup | None = None
    num_blocks: int = 1

    @classmethod
    def of_world(cls, timeout: timedelta | None) -> RankGroup:
        """Build the gloo groups (collective).

        Gloo connects every rank of a group with every other, and its all-reduce passes a message
        around all of them twice: at 1,024 ranks 2,046 times, but 62 times in each of two levels of
        32.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        step = size if size <= _ONE_BLOCK else math.isqrt(size - 1) + 1
        blocks = [list(range(first, min(first + step, size))) for first in range(0, size, step)]
        groups = [dist.new_group(block, timeout=timeout, backend="gloo") for block in blocks]
        leaders = None
        if len(blocks) > 1:
            first_ranks = [block[0] for block in blocks]
            group = dist.new_group(first_ranks, timeout=timeout, backend="gloo")
            leaders = group if rank in first_ranks else None
        return cls(rank, size, groups[rank // step], leaders, len(blocks))

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values = _gather(value, self.group)
        if self.leaders is None:  # not the first rank of one of several blocks
            return values if self.num_blocks == 1 else None
        blocks = _gather(values, self.leaders)
        return None if blocks is None else [each for block in blocks for each in block]

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        values = [value]
        if self.leaders is not None:
            dist.broadcast_object_list(values, group=self.leaders, group_src=0)
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]  # type: ignore[return-value]

    def first_error(self, message: str | None) -> str | None:
        """The message of the lowest rank that has one, on every rank; None if no rank has one."""
        messages = self.gather(message)
        first = next((text for text in messages or [] if text is not None), None)
        return self.broadcast(first)

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; returns this rank's result once all have succeeded.

        Raises:
            AgreedError: on every rank, the user's error of the lowest rank that failed.
        """
        value: T | None = None
        failure: str | None = None
        try:
            value = action()
        except (OSError, ValueError) as error:
            failure = one_line(error)
        failure = self.first_error(failure)
        if failure is not None:
            raise AgreedError(failure)
        return value  # type: ignore[return-value]

    def run_on_rank0(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; returns its result on every rank.

        Raises:
            CheckpointError: on every rank, what rank 0 raised.
        """
        value: T | None = None
        failure: str | None = None
        if self.is_rank0:
            try:
                value = action()
            except (OSError, ValueError) as error:
                failure = one_line(error)
        value, failure = self.broadcast((value, failure))
        if failure is not None:
            raise CheckpointError(failure)
        return value  # type: ignore[return-value]

    def check_on_rank0(self, check: Callable[[], T]) -> T | None:
        """Run on rank 0 a check that has one outcome on all ranks; returns its result there.

        Raises:
            AgreedError: on every rank, the user's error that rank 0 raised.
        """
        value: T | None = None
        failure: str | None = None
        if self.is_rank0:
            try:
                value = check()
            except (OSError, ValueError) as error:
                failure = one_line(error)
        failure = self.broadcast(failure)
        if failure is not None:
            raise AgreedError(failure)
        return value

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on at least one rank: 4 bytes per flag, at every step."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        if self.num_blocks > 1:
            if self.leaders is not None:
                dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.leaders)
            dist.broadcast(values, group=self.group, group_src=0)
        return values.bool().tolist()


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any] | None:
    """The values of all ranks of a group on the first of them; None elsewhere."""
    is_first = dist.get_rank(group) == 0
    values: list[Any] | None = [None] * dist.get_world_size(group) if is_first else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values
