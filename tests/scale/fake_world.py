"""One rank of a world of any size in one process, over torch's fake process groups.

What is local to a rank is real: its part of the model, DeepSpeed's groups, partitions and
optimizer. Collectives return at once and move nothing, so the values of tensors mean nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore


@dataclass
class Groups:
    """Process groups by their number of ranks: those that all ranks make together, and those that
    this rank is in."""

    made: Counter[int] = field(default_factory=Counter)
    joined: Counter[int] = field(default_factory=Counter)


@contextmanager
def counted_groups() -> Iterator[Groups]:
    """Count the process groups that this process makes meanwhile."""
    groups, make = Groups(), distributed_c10d._new_group_with_tag

    def new_group(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        groups.made[len(members)] += 1
        groups.joined[len(members)] += dist.get_rank() in members
        return make(members, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_c10d, "_new_group_with_tag", new_group)
        yield groups


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """Let this process be `rank` of `size`."""
    make, start = distributed_c10d._new_group_with_tag, dist.init_process_group

    def new_group(ranks: Any = None, timeout: Any = None, *_: Any, **options: Any) -> Any:
        return make(ranks, timeout, **options | {"backend": "fake"})

    def init_process_group(*_: Any, **options: Any) -> None:
        start("fake", store=FakeStore(), rank=options["rank"], world_size=options["world_size"])

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", rank), ("LOCAL_RANK", 0), ("WORLD_SIZE", size)):
            patch.setenv(name, str(value))
        patch.setattr(distributed_c10d, "_new_group_with_tag", new_group)
        patch.setattr(dist, "init_process_group", init_process_group)
        yield
