"""What ranks agree on."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pretrain.distributed import consensus
from pretrain.distributed.process_groups import build_rank_group
from tests.distributed import run_ranks


def _flags_of_each(size: int) -> list[list[bool]]:
    """Per call what this rank hears: one flag of one rank, of no rank, and of all."""
    ranks = build_rank_group(None)
    heard = [ranks.any(ranks.rank == asking, ranks.rank < 0) for asking in range(size)]
    return [*heard, ranks.any(False, True), ranks.any(False, False)]


@pytest.mark.parametrize("ring", [0, 64], ids=["exchanges", "ring"])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_flag_of_any_rank_is_heard_by_all(size, ring, monkeypatch):
    monkeypatch.setattr(consensus, "_RING_RANKS", ring)
    expected = [[True, False]] * size + [[False, True], [False, False]]
    assert run_ranks(_flags_of_each, size, size) == [expected] * size


def test_more_ranks_than_a_ring_serves_agree_in_few_exchanges(monkeypatch):
    monkeypatch.setattr(consensus, "_RING_RANKS", 0)
    assert run_ranks(_number_of_sends, 5) == [3] * 5  # ceil(log2(5))


def _number_of_sends() -> int:
    ranks, sent, send = build_rank_group(None), [], dist.isend

    def counted(*arguments, **options):
        sent.append(arguments)
        return send(*arguments, **options)

    dist.isend = counted
    ranks.any(True)
    return len(sent)
