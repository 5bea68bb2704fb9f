"""Windows of a flat token stream in a shuffled order that is computed, not stored.

Letters: T tokens in the stream, s sequence length, W windows, n samples asked for at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, TokenArray
from data_tools.corpus.byte_dataset import ByteStream
from data_tools.corpus.token_stream import TokenStream
from data_tools.errors import DataError
from data_tools.sampling.fim import FillInTheMiddle
from data_tools.sampling.permutation import KeyedPermutation


class Windows(NamedTuple):
    """Spans of s + 1 tokens: inputs are all but the last, labels all but the first."""

    ids: TokenArray  # [n, s + 1]
    segment_ids: npt.NDArray[np.int32] | None  # int32 [n, s + 1]
    starts: IntArray | None = None  # where, in the flattened rows, segment_ids goes up; if known


class Places(NamedTuple):
    """Where samples are: places [n] of the stream, and the epochs [n] they are visited in."""

    starts: IntArray
    epochs: IntArray


class TokenDataset:
    """One stream in an endless shuffled order: an epoch visits its W = (T - 1) // s windows once.

    Window w is the tokens [w*s, (w + 1)*s + 1): neighbours share one token, so that every token but
    the first is predicted once an epoch. The i-th window of the order is pi(i mod W), where pi is
    the keyed permutation of (seed, epoch i // W, name). Nothing is indexed or cached: start-up and
    memory do not grow with the corpus.

    A place in the order is counted in tokens, so that samples may be shorter than a window: those
    of length s / k are its k parts, one after the other.

    Raises:
        DataError: the stream has fewer than s + 1 tokens.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        name: str,
        sequence_length: int,
        seed: int,
        reset_at_documents: bool,
        fim: FillInTheMiddle | None = None,
    ) -> None:
        self.stream = stream
        self.name = name
        self.sequence_length = sequence_length
        self.num_windows = (stream.num_tokens - 1) // sequence_length
        self._seed = seed
        self._reset_at_documents = reset_at_documents
        self._fim = fim
        if self.num_windows < 1:
            raise DataError(
                f"data source {name}: {stream.num_tokens} tokens, but sequence_length "
                f"{sequence_length} needs at least {sequence_length + 1}; add text or shorten it"
            )

    def window_numbers(self, places: IntArray) -> IntArray:
        """Window numbers of places [n] in the order, which count from 0 over all epochs."""
        epochs, places = np.divmod(places, self.num_windows)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            permutation = KeyedPermutation(self.num_windows, key=(self._seed, epoch, self.name))
            mask = epochs == epoch
            numbers[mask] = permutation(places[mask])
        return numbers

    def places(self, positions: IntArray) -> Places:
        """Where the samples at positions [n] of the shuffled order are."""
        numbers, offsets = np.divmod(positions, self.sequence_length)
        starts = self.window_numbers(numbers) * self.sequence_length + offsets
        return Places(starts, numbers // self.num_windows)

    def read(self, places: Places, *, length: int) -> Windows:
        """Samples of `length` tokens and the one that follows."""
        windows = read_windows(
            self.stream,
            starts=places.starts,
            length=length + 1,
            with_segments=self._reset_at_documents,
        )
        if self._fim is None:
            return windows
        ids = self._fim.apply(windows.ids, self.stream, starts=places.starts, epochs=places.epochs)
        return windows._replace(ids=ids)

    def epochs(self, position: int) -> float:
        """How often the windows have been visited when the order is at this place."""
        return position / (self.num_windows * self.sequence_length)


def read_windows(
    stream: TokenStream, *, starts: IntArray, length: int, with_segments: bool
) -> Windows:
    """Read spans, and with `with_segments` number the documents inside each from 0."""
    if not with_segments:
        return Windows(stream.read(starts, length), None)
    ends: IntArray | None
    if isinstance(stream, ByteStream):
        ids, ends = stream.read_with_ends(starts, length)  # no need to look for them
    else:
        ids, ends = stream.read(starts, length), None
        if stream.document_end is not None:
            ends = np.flatnonzero(ids == stream.document_end)
    if ends is not None:
        places = 1 + ends
        places = places[places % length > 0]  # an end in the last column starts nothing in its row
    else:
        found = zip(stream.document_starts(starts, length), starts.tolist(), strict=True)
        rows = [row * length + positions - begin for row, (positions, begin) in enumerate(found)]
        places = np.unique(np.concatenate(rows))  # an empty document starts where the next does
    return Windows(ids, _segment_ids(places, ids.shape), places)


def _segment_ids(places: IntArray, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Number the documents of each row, where `places` of the flattened rows start one."""
    num_rows, length = shape
    if len(places) == 0:
        return np.zeros(shape, dtype=np.int32)
    bounds = np.sort(np.concatenate([np.arange(num_rows) * length, places]))
    rows = bounds // length
    numbers = np.arange(len(bounds)) - np.searchsorted(rows, np.arange(num_rows))[rows]
    counts = np.concatenate([bounds[1:], [num_rows * length]]) - bounds
    return np.repeat(numbers.astype(np.int32), counts).reshape(shape)
