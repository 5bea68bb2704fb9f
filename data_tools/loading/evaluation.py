"""Evaluation batches: held-out text in disjoint windows, with every token scored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from data_tools.arrays import IntArray
from data_tools.corpus.token_stream import NamedStream
from data_tools.loading.batch import Batch, check_ids, has_pinned_memory, to_batch
from data_tools.sampling.token_dataset import Windows, read_windows

_NUM_BYTES = 256
# Of the bytes of a character of UTF-8 after its first.
_HIGH_BITS, _CONTINUATION = 0xC0, 0x80


class EvalBatches:
    """Held-out micro-batches of one data-parallel rank; can be iterated any number of times.

    Window w of a source scores tokens [w*s + 1, (w + 1)*s + 1) given the tokens before each, so
    that every token but a source's first is scored once. A source's last window and the last
    micro-batch are padded with id 0 and label -100, so that all ranks get the same number of
    batches of the same shape. `max_windows` selects that many windows, evenly spread over the text.

    `num_tokens` is the number of scored tokens of all ranks. `num_bytes` is their share of the
    corpus's text, `num_bytes = bytes * num_tokens / tokens`, or None if a source does not record
    its bytes. `num_characters` is the number of characters of UTF-8 that begin at scored tokens, or
    None if the tokens of a source are no bytes.
    """

    def __init__(
        self,
        sources: Sequence[NamedStream],
        *,
        sequence_length: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        vocab_size: int,
        reset_at_documents: bool,
        max_windows: int | None = None,
    ) -> None:
        self.sources = list(sources)
        self._sequence_length = sequence_length
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._vocab_size = vocab_size
        self._reset_at_documents = reset_at_documents
        counts = [-(-(s.stream.num_tokens - 1) // sequence_length) for s in self.sources]
        self._pin = has_pinned_memory()
        self._last_windows = np.cumsum(counts)  # windows are numbered across all sources
        total = sum(counts)
        self.num_windows = total if max_windows is None else min(total, max_windows)
        self._windows = np.arange(self.num_windows) * total // self.num_windows
        scored = [self._scored_tokens(i) for i in range(len(self.sources))]
        self.num_tokens = sum(scored)
        self.num_bytes = self._scored_bytes(scored)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Map the name of each source to the fingerprint of its text."""
        return {source.name: source.stream.fingerprint for source in self.sources}

    @cached_property
    def num_characters(self) -> int | None:
        """Read from the text once."""
        if not all(source.stream.is_bytes for source in self.sources):
            return None
        total = 0
        for window in self._windows.tolist():
            part = self._read(window)
            ids, is_scored = part.ids[0, 1:], np.ones(part.ids.shape[1] - 1, dtype=bool)
            if part.segment_ids is not None:
                is_scored = part.segment_ids[0, 1:] == part.segment_ids[0, :-1]
            begins = (ids < _NUM_BYTES) & (ids & _HIGH_BITS != _CONTINUATION)
            total += int(np.count_nonzero(begins & is_scored))
        return total

    def __len__(self) -> int:
        return -(-self.num_windows // (self._micro_batch_size * self._data_size))

    def __iter__(self) -> Iterator[Batch]:
        size = self._micro_batch_size
        for number in range(len(self)):
            first = (number * self._data_size + self._data_rank) * size
            yield self._batch(self._windows[first : first + size])

    def _batch(self, windows: IntArray) -> Batch:
        """Build a micro-batch of the given windows, padded with rows that are not scored."""
        shape = (self._micro_batch_size, self._sequence_length + 1)
        ids = np.zeros(shape, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int32)
        lengths = np.zeros(shape[0], dtype=np.int64)  # valid tokens of each row
        for row, window in enumerate(windows.tolist()):
            part = self._read(window)
            lengths[row] = part.ids.shape[1]
            ids[row, : lengths[row]] = part.ids[0]
            if part.segment_ids is not None:
                segments[row, : lengths[row]] = part.segment_ids[0]
                segments[row, lengths[row] :] = segments[row, lengths[row] - 1]
        rows = Windows(ids, segments if self._reset_at_documents else None)
        return to_batch(rows, lengths=lengths, pin=self._pin)

    def _read(self, window: int) -> Windows:
        source = int(np.searchsorted(self._last_windows, window, side="right"))
        name, stream = self.sources[source]
        start = (window - self._first_window(source)) * self._sequence_length
        part = read_windows(
            stream,
            starts=np.array([start]),
            length=min(self._sequence_length + 1, stream.num_tokens - start),
            with_segments=self._reset_at_documents,
        )
        check_ids(part.ids, vocab_size=self._vocab_size, name=name)
        return part

    def _first_window(self, source: int) -> int:
        return int(self._last_windows[source - 1]) if source else 0

    def _scored_tokens(self, source: int) -> int:
        stream = self.sources[source].stream
        first, last = self._first_window(source), int(self._last_windows[source])
        own = self._windows[(self._windows >= first) & (self._windows < last)] - first
        starts = own * self._sequence_length
        ends = np.minimum(starts + self._sequence_length, stream.num_tokens - 1)
        scored = int((ends - starts).sum())
        if self._reset_at_documents:
            documents = np.unique(
                stream.document_starts(np.zeros(1, np.int64), stream.num_tokens)[0]
            )
            before = [np.searchsorted(documents, each, side="right") for each in (starts, ends)]
            scored -= int((before[1] - before[0]).sum())
        return scored

    def _scored_bytes(self, scored: Sequence[int]) -> int | None:
        total = 0.0
        for source, num_scored in zip(self.sources, scored, strict=True):
            if source.stream.num_bytes is None:
                return None
            total += source.stream.num_bytes * num_scored / source.stream.num_tokens
        return round(total)
