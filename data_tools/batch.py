"""What a loader yields."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default ignore_index


class Batch(NamedTuple):
    """One micro-batch of one data-parallel rank.

    `labels[i, t]` is the token that follows `tokens[i, t]`, already shifted, or -100 where nothing
    is scored: padding and, with `reset_at_documents`, the first token of a document.
    """

    tokens: torch.Tensor  # int64 [b, s]
    labels: torch.Tensor  # int64 [b, s]
    segment_ids: torch.Tensor | None  # int32 [b, s], 0 for the first document of each row
