"""Fill-in-the-middle: documents rearranged so that a causal model learns to fill a gap.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255):
a document is cut in two places into prefix, middle and suffix and becomes, with three sentinels,

    PSM   PRE prefix SUF suffix MID middle
    SPM   PRE SUF suffix MID prefix middle          (the second of their two variants)

A rearranged piece must keep its length, so that samples are found without an index: it gives up its
last three tokens before it is cut. The paper cuts between characters. Here cuts are between tokens,
so that only byte sources have cuts inside words.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, TokenArray
from data_tools.corpus.token_stream import Span, TokenStream

_NUM_SENTINELS = 3
_DRAWS = struct.Struct("<4Q")
_WORD = 1 << 64


class Sentinels(NamedTuple):
    """Ids of the three marks."""

    prefix: int
    suffix: int
    middle: int


class FillInTheMiddle:
    """Rearranges the documents of samples, each with probability `rate`, SPM with `spm_rate`.

    `level` document: whole documents are cut, and a sample sees what falls into it. `level` window:
    the part of a document that lies in a sample is cut, so that no sample loses a sentinel of it.
    What happens depends on the seed, the source's name, the epoch and the place, on nothing else.
    """

    def __init__(
        self,
        sentinels: Sentinels,
        *,
        rate: float,
        spm_rate: float,
        level: Literal["document", "window"],
        key: str,
    ) -> None:
        self._sentinels = sentinels
        self._rate = rate
        self._spm_rate = spm_rate
        self._level = level
        self._key = key

    def apply(
        self, ids: TokenArray, stream: TokenStream, *, starts: IntArray, epochs: IntArray
    ) -> npt.NDArray[np.int64]:
        """Samples [n, length] from places `starts` [n] of the stream, rearranged."""
        result = ids.astype(np.int64)
        num_tokens = ids.shape[1]
        documents = stream.document_starts(starts, num_tokens)
        for row, start, epoch, inner in zip(
            result, starts.tolist(), epochs.tolist(), documents, strict=True
        ):
            window = Span(start, start + num_tokens)
            bounds = [start, *np.unique(inner).tolist(), window.end]
            for begin, end in itertools.pairwise(bounds):
                piece = Span(begin, end)
                if self._level == "document":
                    piece = stream.document_at(begin)
                self._rearrange(row, stream, piece, window, epoch)
        return result

    def _rearrange(
        self, row: npt.NDArray[np.int64], stream: TokenStream, piece: Span, window: Span, epoch: int
    ) -> None:
        """Draw what becomes of a piece, and write what of it falls into the window."""
        text = _without_marks(stream, piece)
        size = text.end - text.begin - _NUM_SENTINELS
        coin, order, *cuts = self._draw(f"{epoch} {piece.begin}")
        if size < 1 or coin >= self._rate * _WORD:
            return
        first, second = sorted(text.begin + cut % (size + 1) for cut in cuts)
        parts = self._parts(
            Span(text.begin, first),
            Span(first, second),
            Span(second, text.begin + size),
            suffix_first=order < self._spm_rate * _WORD,
        )
        for place, part in _placed(parts, text.begin):
            _write(row, stream, part, place=place - window.begin)

    def _parts(
        self, prefix: Span, middle: Span, suffix: Span, *, suffix_first: bool
    ) -> Sequence[Span | int]:
        marks = self._sentinels
        if suffix_first:
            return [marks.prefix, marks.suffix, suffix, marks.middle, prefix, middle]
        return [marks.prefix, prefix, marks.suffix, suffix, marks.middle, middle]

    def _draw(self, where: str) -> tuple[int, ...]:
        digest = hashlib.blake2b(f"{self._key} {where}".encode(), digest_size=_DRAWS.size)
        return _DRAWS.unpack(digest.digest())


def _without_marks(stream: TokenStream, piece: Span) -> Span:
    """The piece without the tokens that begin and end its document, which stay where they are."""
    begin, bos_ids = piece.begin, stream.bos_ids
    # A window may begin between them.
    for count in range(min(len(bos_ids), piece.end - begin), 0, -1):
        if tuple(stream.read(np.array([begin]), count)[0].tolist()) == bos_ids[-count:]:
            begin += count
            break
    last = int(stream.read(np.array([piece.end - 1]), 1)[0, 0])
    return Span(begin, max(begin, piece.end - (last == stream.eod_id)))


def _placed(parts: Sequence[Span | int], place: int) -> Iterator[tuple[int, Span | int]]:
    for part in parts:
        yield place, part
        place += 1 if isinstance(part, int) else part.end - part.begin


def _write(
    row: npt.NDArray[np.int64], stream: TokenStream, part: Span | int, *, place: int
) -> None:
    """Put what of a part falls into the row there."""
    if isinstance(part, int):
        if 0 <= place < len(row):
            row[place] = part
        return
    begin = max(part.begin, part.begin - place)
    end = min(part.end, part.begin - place + len(row))
    if begin < end:
        place += begin - part.begin
        row[place : place + end - begin] = stream.read(np.array([begin]), end - begin)[0]
