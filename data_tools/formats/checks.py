"""Checks of every block on its way from one format to another."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from data_tools.arrays import IntArray, TokenArray
from data_tools.errors import DataError
from data_tools.files import Digest
from data_tools.formats.blocks import Block, Boundary
from data_tools.formats.manifest import HASH, Manifest

Algorithm = Literal["sha256", "xxh3_128"]


def algorithm_of(recorded: Manifest) -> Algorithm:
    """Return how the ids of a corpus were hashed."""
    return "sha256" if (recorded.ids_hash or "").startswith("sha256:") else HASH


class Tally:
    """Counts and checksums of the blocks that pass."""

    def __init__(self, algorithm: Algorithm | None) -> None:
        """`algorithm`: that of the checksum of ids; None: they are not hashed."""
        self._algorithm = algorithm
        self.ids = None if algorithm is None else Digest(algorithm)
        self._ends = Digest(HASH)
        self.num_documents = self.num_tokens = 0

    def count(self, block: Block) -> None:
        """Count a block, but leave its ids to be hashed while they are written."""
        ends = (block.ends + self.num_tokens).astype("<i8")
        self._ends.update(ends.tobytes())
        self.num_documents += len(block.ends)
        self.num_tokens += len(block.ids)

    @property
    def ids_hash(self) -> str | None:
        return None if self.ids is None else f"{self._algorithm}:{self.ids.hexdigest()}"

    @property
    def ends_hash(self) -> str:
        return f"{HASH}:{self._ends.hexdigest()}"

    def compare(self, name: str, recorded: Manifest, *, with_documents: bool) -> None:
        """Compare with what is recorded beside the corpus.

        `with_documents`: they are those that are recorded, not cut anew by another token.

        Raises:
            DataError: something differs.
        """
        remedy = (
            "it is damaged: copy it again, or delete the .json to convert it without its checks"
        )
        for what, found, expected, compared in (
            ("tokens", self.num_tokens, recorded.num_tokens, True),
            ("documents", self.num_documents, recorded.num_documents, with_documents),
            ("checksum of the ids", self.ids_hash, recorded.ids_hash, True),
            ("checksum of the document ends", self.ends_hash, recorded.ends_hash, with_documents),
        ):
            if compared and expected is not None and found != expected:
                raise DataError(f"{name}: {what} {found} found, {expected} expected; {remedy}")


class Documents:
    """Follows the documents of a source: empty ones, and the tokens that end or begin them."""

    def __init__(
        self,
        boundary: Boundary,
        *,
        only_there: bool,
        last_may_lack_it: bool,
        drop_empty: bool,
        keep_empty: bool,
    ) -> None:
        """`only_there`: the tokens must stand nowhere else, because they replace boundaries."""
        self._eod, self._bos = boundary
        self._only_there = only_there
        self._last_may_lack_it = last_may_lack_it or only_there
        self._drop_empty, self._keep_empty = drop_empty, keep_empty
        self._open = 0  # tokens of the document that goes on
        self._without_end: Block | None = None
        self._begins_without = False
        self.num_documents = self.num_empty = 0

    @property
    def token_found(self) -> bool:
        """Whether a token that cuts documents stands anywhere."""
        if self.num_documents != 1:
            return True
        return not self._begins_without if self._eod is None else self._without_end is None

    @property
    def all_end(self) -> bool:
        """Whether every document so far ends with the end token."""
        return self._eod is not None and self._without_end is None

    def check(self, block: Block) -> Block:
        """Return the block without empty documents, if these are dropped.

        Raises:
            DataError: a document is empty, or does not end or begin as it must.
        """
        lengths = np.diff(block.ends, prepend=-self._open)
        if (lengths == 0).any():
            block = self._without_empty(block, lengths)
        if self._eod is not None:
            self._check_ends(block, self._eod)
        if self._bos is not None:
            self._check_begins(block, self._bos)
        self.num_documents += len(block.ends)
        last = int(block.ends[-1]) if len(block.ends) else -self._open
        self._open = len(block.ids) - last
        return block

    def _without_empty(self, block: Block, lengths: IntArray) -> Block:
        first = self.num_documents + int(np.argmin(lengths))
        if self._keep_empty and self._eod is None and self._bos is None:
            return block
        if not self._drop_empty:
            why = "which the output cannot hold"
            if self._keep_empty:
                why = f"but every document ends with id {self._eod} of --eod or of the .json"
            raise DataError(
                f"{block.path}: document {first} has 0 tokens, {why}; pass --drop-empty to leave "
                "out empty documents"
            )
        self.num_empty += int((lengths == 0).sum())
        return block._replace(ends=block.ends[lengths > 0])

    def _check_ends(self, block: Block, eod: int) -> None:
        if self._without_end is not None and len(block.ids):
            raise self._not_at_end(self._without_end, self.num_documents - 1, eod)
        # No document is empty, so that one ends with the last token before its end.
        ended = block.ids[block.ends - 1] == eod if len(block.ids) else np.ones(0, bool)
        if not ended.all():
            may = self._last_may_lack_it and ended[:-1].all() and block.ends[-1] == len(block.ids)
            if may:  # what follows the last end token is a document; the next block shows
                self._without_end = block
            else:
                index = self.num_documents + int(np.argmin(ended))
                raise self._not_at_end(block, index, eod)
        if self._only_there and np.count_nonzero(block.ids == eod) != np.count_nonzero(ended):
            inside = np.setdiff1d(np.flatnonzero(block.ids == eod), block.ends - 1)
            raise self._inside(block, int(inside[0]), "--eod", eod)

    def _check_begins(self, block: Block, bos: int) -> None:
        begins = block.ends[block.ends < len(block.ids)]
        if self._open == 0 and len(block.ids):
            begins = np.concatenate(([0], begins))
        wrong = block.ids[begins] != bos
        if wrong.any():
            index = self.num_documents + int(np.argmax(wrong)) + (self._open > 0)
            self._begins_without = index == 0
            if index > 0:  # before the first begin token there may be a piece of a document
                raise DataError(
                    f"{block.path}: document {index} begins with id "
                    f"{block.ids[begins[np.argmax(wrong)]]}, not with {bos} of --bos, which alone "
                    "shows where documents begin in the output; pass the id that begins every "
                    "document, or --no-boundaries to lose them"
                )
        if np.count_nonzero(block.ids == bos) != np.count_nonzero(~wrong):
            inside = np.setdiff1d(np.flatnonzero(block.ids == bos), begins)
            raise self._inside(block, int(inside[0]), "--bos", bos)

    def _not_at_end(self, block: Block, index: int, eod: int) -> DataError:
        why = ", which alone shows where documents end in the output" if self._only_there else ""
        lose = ", or --no-boundaries to lose them" if self._only_there else ", or remove it"
        return DataError(
            f"{block.path}: document {index} does not end with id {eod} of --eod{why}; pass the id "
            f"that ends every document{lose}"
        )

    def _inside(self, block: Block, position: int, option: str, token: int) -> DataError:
        index, offset = place(block, position, self.num_documents, self._open)
        return DataError(
            f"{block.path}: id {token} of {option} stands at token {offset} inside document "
            f"{index}, where a reader of the output would cut it; pass the id that stands only "
            "between documents, or --no-boundaries to lose them"
        )


def place(block: Block, position: int, num_documents: int, open_tokens: int) -> tuple[int, int]:
    """Return the number of the document around a token of a block, and the token's place in it."""
    index = int(np.searchsorted(block.ends, position, side="right"))
    begin = int(block.ends[index - 1]) if index else -open_tokens
    return num_documents + index, position - begin


class Fit:
    """Converts ids to the dtype of the output, and refuses the first that does not fit."""

    def __init__(self, source: np.dtype[Any], target: np.dtype[Any], vocab_size: int | None):
        self._target = target.newbyteorder("<")
        held = int(np.iinfo(target).max) + 1
        self._limit = min(held, vocab_size or held)
        self._narrower = self._limit == held and (vocab_size is None or vocab_size >= held)
        limits = np.iinfo(source)
        self._all_fit = limits.min >= 0 and limits.max < self._limit
        self._num_documents = self._open = 0

    def convert(self, block: Block) -> Block:
        """Return the block with ids of the output's dtype.

        Raises:
            DataError: an id is negative or too large.
        """
        ids = block.ids
        if not self._all_fit and len(ids) and (ids.min() < 0 or ids.max() >= self._limit):
            raise self._refusal(block)
        self._num_documents += len(block.ends)
        self._open = len(ids) - int(block.ends[-1]) if len(block.ends) else self._open + len(ids)
        return block._replace(ids=_cast(ids, self._target))

    def _refusal(self, block: Block) -> DataError:
        ids = block.ids
        position = int(np.flatnonzero((ids < 0) | (ids >= self._limit))[0])
        index, offset = place(block, position, self._num_documents, self._open)
        byte = "" if block.offset is None else f", byte {block.offset + position * ids.itemsize},"
        why = "the vocabulary of --vocab-size or --tokenizer"
        remedy = "pass that of its tokenizer, or the right --dtype"
        if self._narrower:
            why = f"which {self._target.name} of the output can hold"
            remedy = "choose another --to, or check the dtype and ids of the input"
        return DataError(
            f"{block.path}: id {ids[position]} at token {offset} of document {index}{byte} is "
            f"outside [0, {self._limit}), {why}; {remedy}"
        )


def _cast(ids: TokenArray, target: np.dtype[Any]) -> TokenArray:
    if ids.dtype.itemsize == target.itemsize and ids.dtype.isnative:
        return np.ascontiguousarray(ids).view(target)
    return np.ascontiguousarray(ids, target)


def output_dtype(source: np.dtype[Any], names: tuple[str, ...]) -> np.dtype[Any]:
    """Return the input's dtype if the output has it, else the narrowest of at least its width.

    An output without such a width gets its widest, which not every id may fit.
    """
    if source.name in names:
        return source.newbyteorder("<")
    dtypes = sorted(map(np.dtype, names), key=lambda dtype: dtype.itemsize)
    wide = [dtype for dtype in dtypes if dtype.itemsize >= source.itemsize]
    return (wide or dtypes[-1:])[0].newbyteorder("<")
