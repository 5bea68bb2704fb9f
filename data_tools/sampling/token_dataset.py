"""Windows of a flat token stream in a shuffled order that is computed, not stored.

Notation: T tokens in the stream, s sequence length, W windows, n samples per call.
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
    boundaries: IntArray | None = None  # indices into the flattened rows where segment_ids rises


class SampleLocations(NamedTuple):
    """Stream offsets [n] of samples, and the epochs [n] in which they are read."""

    starts: IntArray
    epochs: IntArray


class TokenDataset:
    """A stream in an endless shuffled order; an epoch visits its W = (T - 1) // s windows once.

    Window w is the tokens [w*s, (w + 1)*s + 1): neighbours share one token, so that every token but
    the first is predicted once per epoch. The i-th window of the order is pi(i mod W), where pi is
    the keyed permutation of (seed, epoch i // W, name). Nothing is indexed or cached: start-up time
    and memory do not grow with the corpus.

    Positions in the order are counted in tokens, so that samples may be shorter than a window: a
    window is read as k consecutive samples of length s / k.

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

    def window_numbers(self, indices: IntArray) -> IntArray:
        """Return the window numbers at indices [n] of the shuffled order, counted over epochs."""
        epochs, indices = np.divmod(indices, self.num_windows)
        numbers = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            permutation = KeyedPermutation(self.num_windows, key=(self._seed, epoch, self.name))
            mask = epochs == epoch
            numbers[mask] = permutation(indices[mask])
        return numbers

    def locate(self, positions: IntArray) -> SampleLocations:
        """Return the locations of the samples at positions [n] of the shuffled order."""
        indices, offsets = np.divmod(positions, self.sequence_length)
        starts = self.window_numbers(indices) * self.sequence_length + offsets
        return SampleLocations(starts, indices // self.num_windows)

    def read(self, locations: SampleLocations, *, length: int) -> Windows:
        """Read samples of `length` tokens, each with the token that follows it."""
        windows = read_windows(
            self.stream,
            starts=locations.starts,
            length=length + 1,
            with_segments=self._reset_at_documents,
        )
        if self._fim is None:
            return windows
        ids = self._fim.apply(
            windows.ids, self.stream, starts=locations.starts, epochs=locations.epochs
        )
        return windows._replace(ids=ids)

    def epochs(self, position: int) -> float:
        """Return the number of passes over the windows up to a position of the order."""
        return position / (self.num_windows * self.sequence_length)


def read_windows(
    stream: TokenStream, *, starts: IntArray, length: int, with_segments: bool
) -> Windows:
    """Read spans; `with_segments` also numbers the documents of each span from 0."""
    if not with_segments:
        return Windows(stream.read(starts, length), None)
    ends: IntArray | None
    if isinstance(stream, ByteStream):
        ids, ends = stream.read_with_ends(starts, length)  # saves a search for the end tokens
    else:
        ids, ends = stream.read(starts, length), None
        if stream.document_end is not None:
            ends = np.flatnonzero(ids == stream.document_end)
    if ends is not None:
        boundaries = 1 + ends
        # A document that ends in the last column has no successor in its row.
        boundaries = boundaries[boundaries % length > 0]
    else:
        found = zip(stream.document_starts(starts, length), starts.tolist(), strict=True)
        rows = [row * length + positions - begin for row, (positions, begin) in enumerate(found)]
        boundaries = np.unique(np.concatenate(rows))  # an empty document shares its successor's
    return Windows(ids, _segment_ids(boundaries, ids.shape), boundaries)


def _segment_ids(boundaries: IntArray, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Number the documents of each row, given where they start in the flattened rows."""
    num_rows, length = shape
    if len(boundaries) == 0:
        return np.zeros(shape, dtype=np.int32)
    bounds = np.sort(np.concatenate([np.arange(num_rows) * length, boundaries]))
    rows = bounds // length
    numbers = np.arange(len(bounds)) - np.searchsorted(rows, np.arange(num_rows))[rows]
    counts = np.concatenate([bounds[1:], [num_rows * length]]) - bounds
    return np.repeat(numbers.astype(np.int32), counts).reshape(shape)
