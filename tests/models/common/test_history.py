from __future__ import annotations

import pytest
import torch

from models.common.history import History
from tests.refusals import assert_refused


@pytest.mark.parametrize("reach", [1, 3, 8])
def test_a_history_is_the_end_of_a_list(reach):
    generator = torch.Generator().manual_seed(reach)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    history, entries, most = History(reach, dim=1), [], 0
    for _ in range(300):
        if draw(0, 3):
            new = torch.randn(2, draw(1, 2 * reach + 1), generator=generator)
            before = min(draw(0, reach), len(entries), history.kept)
            joined = history.extended(new, before)
            entries = [*entries, *new.T]
            expected = entries[len(entries) - new.shape[1] - before :]
            assert torch.equal(joined, torch.stack(expected, dim=1))
            most = max(most, len(entries))
        elif history.kept:
            length = draw(max(len(entries) - history.kept, most - reach), len(entries))
            history.rollback(length)
            entries = entries[:length]
        assert history.length == len(entries)
        # Whatever was taken back, what the reach covered at the longest is still there.
        known = max(0, min(len(entries), reach - (most - len(entries))))
        assert history.kept >= known
        if known:
            assert torch.equal(history.last(known), torch.stack(entries[-known:], dim=1))


def test_a_history_refuses_what_it_does_not_keep():
    history = History(2)
    history.append(torch.arange(5.0))
    with assert_refused("count", value=3, constraint="2 of 5", remedy="fewer"):
        history.last(3)
    with assert_refused("history", value=5, constraint="2", remedy="from 3 to 5"):
        history.rollback(2)
