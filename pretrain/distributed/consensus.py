"""Agreement between the ranks of a run, over small Python objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.errors import AgreedError, CheckpointError, one_line

T = TypeVar("T")

# Up to so many ranks gloo's all-reduce, which passes 2 (size - 1) messages on around a ring, takes
# less time than exchanges that are called from Python.
_RING_RANKS = 64


class RankGroup(NamedTuple):
    """All ranks of the run. `group`: a gloo group over them; None for a single process."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_group(cls, group: dist.ProcessGroup) -> RankGroup:
        """`group` must contain every process, in order, so that group rank 0 is global rank 0."""
        return cls(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
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
        if self.size <= _RING_RANKS:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        else:
            self._disseminate(values)
        return values.bool().tolist()

    def _disseminate(self, values: Tensor) -> None:
        """Maximum over all ranks, in place, in ceil(log2(size)) exchanges.

        After the exchange over a distance of 2^i a rank has the maximum of itself and the
        2^(i+1) - 1 ranks before it. Where these overlap a maximum stays the same.
        """
        received = torch.empty_like(values)
        distance = 1
        while distance < self.size:
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            sending = dist.isend(values.clone(), group=self.group, group_dst=to)
            dist.recv(received, group=self.group, group_src=source)
            assert sending is not None, "a rank is in its own group"
            sending.wait()
            torch.maximum(values, received, out=values)
            distance *= 2
