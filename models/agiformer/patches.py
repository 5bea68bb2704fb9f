"""Layout of the patches of a row.

Byte t of a document, from 0, is the last one that latent t / P sees if P divides t. That latent
predicts bytes t + 1 ... t + P, so that logits are those of the next byte, as in every family, and
the first byte of a document is the one that nothing predicts. A prompt of any length is complete:
its last latent and the bytes after it are all that the next byte depends on.

In a packed row every document begins a patch of its own. A document ends a patch early, by up to P
- 1 bytes, so a row has room for `documents_per_row` of them; shapes stay constant. Documents beyond
that continue the last one that fits, as in training without boundaries, and are counted.

Shapes: s bytes, p patches, b batch, P patch size, K patch kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.agiformer.config import AgiformerConfig
from models.common.marked import marked_first
from models.common.rope import positions_in_segments


class Patches(NamedTuple):
    """Patches of packed rows: `ends` int64 [b, p], the last byte that each sees; `positions` int32
    [b, p], counted from 0 in every document. Patches that a row does not need come last, as
    documents of one byte."""

    ends: Tensor
    positions: Tensor


def num_packed_patches(config: AgiformerConfig, seq_length: int, *, multiple_of: int) -> int:
    """Room for the patches of a packed row, a multiple of the ranks that share them."""
    size = config.patch_size
    most = min(seq_length, (seq_length + config.documents_per_row * (size - 1)) // size)
    return -(-most // multiple_of) * multiple_of


def packed_positions(segment_ids: Tensor, *, documents: int) -> Tensor:
    """Position of every byte in its document, int32 [b, s], the number of documents limited."""
    positions = positions_in_segments(segment_ids)
    begins = positions == 0
    kept = begins & (begins.cumsum(dim=1) <= documents)
    index = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
    return index - torch.where(kept, index, 0).cummax(dim=1).values


def merged_documents(segment_ids: Tensor, *, documents: int) -> Tensor:
    """Documents of every row beyond the number that is kept apart: int64 [b]."""
    return ((positions_in_segments(segment_ids) == 0).sum(dim=1) - documents).clamp(min=0)


def find_patches(positions: Tensor, *, count: int, patch_size: int) -> Patches:
    """The patches of rows with `positions` int32 [b, s]."""
    is_end = positions % patch_size == 0
    ends = marked_first(is_end)
    ends = F.pad(ends[:, :count], (0, max(0, count - ends.shape[1])))
    is_used = torch.arange(count, device=ends.device) < is_end.sum(dim=1, keepdim=True)
    own = positions.gather(1, ends) // patch_size
    return Patches(ends.masked_fill(~is_used, 0), own.masked_fill(~is_used, 0))


def patch_of_bytes(positions: Tensor, *, patch_size: int) -> Tensor:
    """The number of the patch that predicts the byte after each byte: int64 [b, s]."""
    return (positions % patch_size == 0).cumsum(dim=1) - 1


def used_patches(patch_positions: Tensor, positions: Tensor, *, patch_size: int) -> Tensor:
    """Whether the patches of a packed row belong to it: bool [b, p]."""
    count = (positions % patch_size == 0).sum(dim=1, keepdim=True)
    return torch.arange(patch_positions.shape[1], device=count.device) < count
