"""Marked tokens first, against a stable sort."""

from __future__ import annotations

import pytest
import torch

from models.common.marked import marked_first


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [0, 1, 33])
def test_marked_places_come_first_and_each_part_in_order(share, length):
    marks = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < share
    expected = (~marks).to(torch.uint8).argsort(dim=1, stable=True)
    assert torch.equal(marked_first(marks), expected)
