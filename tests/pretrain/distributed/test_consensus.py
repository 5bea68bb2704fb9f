"""Agreement of ranks."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from parallel.checkpoint.errors import AgreedError, CheckpointError
from pretrain.distributed import consensus
from pretrain.distributed.process_groups import build_rank_group
from tests.distributed import run_ranks

ONE_BLOCK = pytest.mark.parametrize("one_block", [1, 64], ids=["blocks", "one block"])
SIZES = pytest.mark.parametrize("size", [2, 3, 5, 8])


@ONE_BLOCK
@SIZES
def test_a_flag_of_any_rank_is_heard_by_all(size, one_block, monkeypatch):
    monkeypatch.setattr(consensus, "_ONE_BLOCK", one_block)
    expected = [[True, False]] * size + [[False, True], [False, False]]
    assert run_ranks(_flags_of_each, size, size) == [expected] * size


def _flags_of_each(size: int) -> list[list[bool]]:
    """Per call what this rank hears: one flag of one rank, of all ranks, and of none."""
    ranks = build_rank_group(None)
    heard = [ranks.any(ranks.rank == asking, ranks.rank < 0) for asking in range(size)]
    return [*heard, ranks.any(False, True), ranks.any(False, False)]


@ONE_BLOCK
@SIZES
def test_values_are_gathered_in_order_and_told_to_all(size, one_block, monkeypatch):
    monkeypatch.setattr(consensus, "_ONE_BLOCK", one_block)
    everyone = [f"of {rank}" for rank in range(size)]
    assert run_ranks(_gathered_and_told, size) == [
        (everyone if rank == 0 else None, "of 0") for rank in range(size)
    ]


def _gathered_and_told() -> tuple[list[str] | None, str]:
    ranks = build_rank_group(None)
    own = f"of {ranks.rank}"
    return ranks.gather(own), ranks.broadcast(own if ranks.is_rank0 else None)


@ONE_BLOCK
def test_an_error_of_any_rank_is_raised_by_all(one_block, monkeypatch):
    monkeypatch.setattr(consensus, "_ONE_BLOCK", one_block)
    expected = ["ValueError: of 3", "ValueError: of 4", "none", "ValueError: of 0"]
    assert run_ranks(_errors, 5) == [expected] * 5


def _errors() -> list[str]:
    """What this rank raises if the ranks from 3 on fail, if the last one does, none, and 0."""
    ranks = build_rank_group(None)

    def fail(*, if_: bool) -> None:
        if if_:
            raise ValueError(f"of {ranks.rank}")

    heard = []
    for first in (3, 4, 5):
        try:
            ranks.run_on_all_ranks(lambda first=first: fail(if_=ranks.rank >= first))
            heard.append("none")
        except AgreedError as error:
            heard.append(str(error))
    try:
        ranks.run_on_rank0(lambda: fail(if_=True))
    except CheckpointError as error:
        heard.append(str(error))
    return heard


def test_ranks_are_connected_with_those_of_their_block_alone(monkeypatch):
    monkeypatch.setattr(consensus, "_ONE_BLOCK", 1)
    assert run_ranks(_members, 8) == [
        [[0, 1, 2], [0, 3, 6]], [[0, 1, 2]], [[0, 1, 2]],
        [[3, 4, 5], [0, 3, 6]], [[3, 4, 5]], [[3, 4, 5]],
        [[6, 7], [0, 3, 6]], [[6, 7]],
    ]  # fmt: skip


def _members() -> list[list[int]]:
    ranks = build_rank_group(None)
    groups = [group for group in (ranks.group, ranks.leaders) if group is not None]
    return [dist.get_process_group_ranks(group) for group in groups]
