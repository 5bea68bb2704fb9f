"""Marked tokens of rows before the others.

Shapes: b batch, s tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def marked_first(marks: Tensor) -> Tensor:
    """The places of every row, those with a mark first, each part in order: bool [b, s] -> int64
    [b, s], a stable sort whose shapes do not depend on the marks."""
    # Counted, not sorted: ONNX has no stable sort.
    index = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    seen = marks.cumsum(dim=1)
    place = torch.where(marks, seen - 1, seen[:, -1:] + index - seen)
    return torch.empty_like(place).scatter(1, place, index)
