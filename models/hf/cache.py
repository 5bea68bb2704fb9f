"""The layers' caches behind transformers' `Cache` interface.

Shapes: b batch, s columns of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import Cache


class RowGroup(NamedTuple):
    """Rows that begin at the same column, and the layers' caches of these rows.

    `rows` int64 [n], or None where they are all rows.
    """

    rows: Tensor | None
    start: int
    layers: dict[str, Any]


class FamilyCache(Cache):
    """The caches of all layers for one generation of at most `max_length` columns.

    A layer's cache has one length for all of its rows. Left-padded rows are therefore grouped by
    their first column: padding enters no state, and a batch with g different starts takes g calls
    per step. The caches are created in the first call.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self.length = 0
        self.groups: list[RowGroup] = []
        self._batch_size = 0
        self._starts: Tensor | None = None

    def extend(
        self,
        num_columns: int,
        attention_mask: Tensor | None,
        new_layers: Callable[[int, int], dict[str, Any]],
        *,
        batch_size: int,
    ) -> list[tuple[RowGroup, int]]:
        """Count the columns of a call; returns each group with the first column of its rows.

        `attention_mask` [b, columns so far and of this call]; `new_layers(batch_size, max_length)`
        makes the caches of a group.

        Raises:
            ValueError: the mask does not continue that of the earlier calls.
        """
        total = self.length + num_columns
        starts = None
        if attention_mask is not None:
            starts = self._checked_starts(attention_mask, (batch_size, total))
        if not self.groups:
            self._begin(starts, batch_size, new_layers)
        elif batch_size != self._batch_size:
            raise ValueError(
                f"input_ids of {batch_size} rows with a cache of {self._batch_size} rows; continue "
                "all of its rows, or begin a new cache"
            )
        elif (starts is None) != (self._starts is None) or not _equal(starts, self._starts):
            raise ValueError(
                "attention_mask marks other padding than in the first call with this cache; "
                "pass the first mask with a one added for every new token"
            )
        parts = [(group, max(0, group.start - self.length)) for group in self.groups]
        self.length = total
        return parts

    def _checked_starts(self, mask: Tensor, shape: tuple[int, int]) -> Tensor | None:
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} must be {list(shape)}: a column for "
                "every token in the cache and of this call"
            )
        starts, stops = row_bounds(mask)
        if bool((stops < shape[1]).any()):
            raise ValueError(
                "attention_mask has padding on the right of a call with a cache, where the next "
                'token goes; pad on the left (padding_side="left" of the tokenizer)'
            )
        return starts if bool(starts.any()) else None

    def _begin(
        self, starts: Tensor | None, batch_size: int, new_layers: Callable[..., dict[str, Any]]
    ) -> None:
        self._starts, self._batch_size = starts, batch_size
        if starts is None:
            self.groups = [RowGroup(None, 0, new_layers(batch_size, self.max_length))]
            return
        for start in starts.unique().tolist():
            rows = (starts == start).nonzero().squeeze(1)
            layers = new_layers(len(rows), self.max_length - start)
            self.groups.append(RowGroup(rows, start, layers))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Maximum number of columns."""
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` columns, as assisted generation does.

        Raises:
            ValueError: a positive number, or more than the layers can take back.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to forget, negative"
            )
        length = self.length + tokens_to_remove
        if length < self.length:
            for group in self.groups:
                for layer in group.layers.values():
                    layer.rollback(length - group.start)
        self.length = length

    def reset(self) -> None:
        """Forget everything."""
        self.length, self.groups, self._starts = 0, [], None

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        _refuse_rows("reordered, as beam search does")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        _refuse_rows("repeated")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        _refuse_rows("selected")


def row_bounds(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and end column (exclusive) of every row: [b, s] -> int64 [b] each.

    Raises:
        ValueError: a row is empty, or has padding between its tokens.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} must be [batch, columns] with "
            "ones for tokens and zeros for padding"
        )
    seen = attention_mask != 0
    counts = seen.sum(dim=1)
    starts = seen.int().argmax(dim=1)
    stops = seen.shape[1] - seen.flip(1).int().argmax(dim=1)
    if bool(((counts == 0) | (stops - starts != counts)).any()):
        raise ValueError(
            "attention_mask has a row without tokens, or with padding between them; every row must "
            "be one run of tokens with padding before or after it"
        )
    return starts, stops


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _refuse_rows(what: str) -> NoReturn:
    raise ValueError(
        f"the rows of this model's cache cannot be {what}; pass use_cache=False or num_beams=1"
    )
