"""Fill-in-the-middle: rearranges documents so that a causal model learns to infill.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255):
a document is cut twice into prefix, middle and suffix and becomes, with three sentinel tokens,

    PSM   PRE prefix SUF suffix MID middle
    SPM   PRE SUF suffix MID prefix middle          (the second of their two variants)

A rearranged piece keeps its length, so that samples can be located without an index: its last three
tokens are dropped before it is cut. The paper cuts between characters. Here cuts fall between
tokens, so that only byte sources have cuts inside words.
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

_NUM_FIM_TOKENS = 3
_DRAWS = struct.Struct("<4Q")
_WORD = 1 << 64


class FimTokens(NamedTuple):
    """Ids of the three sentinel tokens of fill-in-the-middle."""

    prefix: int
    suffix: int
    middle: int


class FillInTheMiddle:
    """Rearranges each document of a sample with probability `rate`, as SPM with `spm_rate`.

    `level` document: whole documents are cut, and a sample gets the part inside its window.
    `level` window: only the part of a document inside the sample is cut, so that no sentinel is
    lost. The outcome depends only on the seed, source name, epoch and stream offset.
    """

    def __init__(
        self,
        tokens: FimTokens,
        *,
        rate: float,
        spm_rate: float,
        level: Literal["document", "window"],
        key: str,
    ) -> None:
        self._tokens = tokens
        self._rate = rate
        self._spm_rate = spm_rate
        self._level = level
        self._key = key

    def apply(
        self, ids: TokenArray, stream: TokenStream, *, starts: IntArray, epochs: IntArray
    ) -> npt.NDArray[np.int64]:
        """Rearrange samples [n, length] read from stream offsets `starts` [n]."""
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
        """Draw the rearrangement of a piece, and write the part inside the window."""
        text = _without_boundary_tokens(stream, piece)
        size = text.end - text.begin - _NUM_FIM_TOKENS
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
        for offset, part in _with_offsets(parts, text.begin):
            _write(row, stream, part, offset=offset - window.begin)

    def _parts(
        self, prefix: Span, middle: Span, suffix: Span, *, suffix_first: bool
    ) -> Sequence[Span | int]:
        tokens = self._tokens
        if suffix_first:
            return [tokens.prefix, tokens.suffix, suffix, tokens.middle, prefix, middle]
        return [tokens.prefix, prefix, tokens.suffix, suffix, tokens.middle, middle]

    def _draw(self, location: str) -> tuple[int, ...]:
        digest = hashlib.blake2b(f"{self._key} {location}".encode(), digest_size=_DRAWS.size)
        return _DRAWS.unpack(digest.digest())


def _without_boundary_tokens(stream: TokenStream, piece: Span) -> Span:
    """Exclude the document's begin and end tokens, which keep their positions."""
    begin, bos_ids = piece.begin, stream.bos_ids
    # A window may start between two begin tokens.
    for count in range(min(len(bos_ids), piece.end - begin), 0, -1):
        if tuple(stream.read(np.array([begin]), count)[0].tolist()) == bos_ids[-count:]:
            begin += count
            break
    last = int(stream.read(np.array([piece.end - 1]), 1)[0, 0])
    return Span(begin, max(begin, piece.end - (last == stream.eod_id)))


def _with_offsets(parts: Sequence[Span | int], offset: int) -> Iterator[tuple[int, Span | int]]:
    for part in parts:
        yield offset, part
        offset += 1 if isinstance(part, int) else part.end - part.begin


def _write(
    row: npt.NDArray[np.int64], stream: TokenStream, part: Span | int, *, offset: int
) -> None:
    """Write a part at an offset of the row, clipped to the row."""
    if isinstance(part, int):
        if 0 <= offset < len(row):
            row[offset] = part
        return
    begin = max(part.begin, part.begin - offset)
    end = min(part.end, part.begin - offset + len(row))
    if begin < end:
        offset += begin - part.begin
        row[offset : offset + end - begin] = stream.read(np.array([begin]), end - begin)[0]
