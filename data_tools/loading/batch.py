"""Micro-batches of tokens and labels, built from windows of a token stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_tools.arrays import IntArray, TokenArray
from data_tools.errors import DataError
from data_tools.sampling.token_dataset import Windows

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default ignore_index


class Batch(NamedTuple):
    """One micro-batch of one data-parallel rank.

    `labels[i, t]` is the token after `tokens[i, t]`, already shifted, or -100 where no loss is
    computed: padding and, with `reset_at_documents`, the first token of a document.
    """

    tokens: torch.Tensor  # int64 [b, s]
    labels: torch.Tensor  # int64 [b, s]
    segment_ids: torch.Tensor | None  # int32 [b, s], 0 for the first document of each row


def check_ids(ids: TokenArray, *, vocab_size: int, name: str) -> None:
    """Check that ids are in [0, vocab_size): others cause illegal memory accesses on a GPU.

    Raises:
        DataError: an id is outside.
    """
    low = 0 if ids.dtype.kind == "u" else int(ids.min())
    high = int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"data source {name}: token id {low if low < 0 else high} is outside the model's "
            f"vocabulary of {vocab_size}; set model.vocab_size to the tokenizer's; python -m "
            f"data_tools.verify PREFIX --vocab-size {vocab_size} reports the document and token"
        )


def to_batch(windows: Windows, *, lengths: IntArray | None = None, pin: bool = False) -> Batch:
    """Split [b, s + 1] windows into inputs and shifted labels.

    Args:
        lengths: Valid tokens of each row, [b]; labels after them are -100.
        pin: Use page-locked memory.
    """
    tokens = windows.ids[:, :-1].astype(np.int64)
    labels = windows.ids[:, 1:].astype(np.int64)
    segments = windows.segment_ids
    if segments is not None:
        starts = windows.boundaries if windows.boundaries is not None else _boundaries(segments)
        # The first token of a document has no context in its document to be predicted from. Its
        # label is one column before it, and rows of labels are one shorter.
        labels.reshape(-1)[starts - 1 - starts // segments.shape[1]] = IGNORED_LABEL
    if lengths is not None:
        labels[np.arange(1, windows.ids.shape[1]) >= lengths[:, None]] = IGNORED_LABEL
    return Batch(
        tokens=_tensor(tokens, pin=pin),
        labels=_tensor(labels, pin=pin),
        segment_ids=None if segments is None else _tensor(segments[:, :-1], pin=pin),
    )


def _boundaries(segments: npt.NDArray[np.int32]) -> IntArray:
    """Return the indices into the flattened rows where a document starts inside a row."""
    flat = segments.reshape(-1)
    boundaries = 1 + np.flatnonzero(flat[1:] != flat[:-1])
    return boundaries[boundaries % segments.shape[1] > 0]


def has_pinned_memory() -> bool:
    """Return whether copies to a device benefit from page-locked memory."""
    return torch.cuda.is_available()


def _tensor(array: npt.NDArray[Any], *, pin: bool) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if pin else tensor
