"""Tokenizers behind one interface: Hugging Face, SentencePiece and tiktoken files, raw bytes.

Their libraries are imported only when such a tokenizer is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from data_tools.errors import DataError, cwd_hint
from data_tools.tokenization import hugging_face_files, sentencepiece_files
from data_tools.tokenization.boundary_tokens import BoundaryToken, BoundaryTokens
from data_tools.tokenization.byte_vocabulary import BYTE_EOD, BYTE_VOCAB_SIZE
from data_tools.tokenization.hugging_face_files import MERGES, VOCAB, HuggingFaceTokenizer
from data_tools.tokenization.sentencepiece_files import SentencePieceTokenizer
from data_tools.tokenization.special_tokens import SpecialTokens
from data_tools.tokenization.tiktoken_files import ENCODINGS, TiktokenTokenizer, split_tiktoken_spec

TOKENIZER_HELP = (
    "bytes; a tokenizer.json, or a directory with one; a directory with vocab.json and merges.txt; "
    "a SentencePiece .model; or FILE:ENCODING, a file of tiktoken ranks and its encoding "
    f"({', '.join(ENCODINGS)})"
)
_FILES = ("tokenizer.json", "tokenizer.model", VOCAB)


class Tokenizer(Protocol):
    """Interface of all tokenizers; begin and end tokens are added by the caller."""

    @property
    def name(self) -> str:
        """File of the tokenizer, for messages."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def boundary_tokens(self) -> BoundaryTokens:
        """Begin and end tokens of documents, and the source of their declaration."""

    @property
    def eod_id(self) -> int | None:
        """End-of-document id; None if none is declared."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file and the additions of files beside it, or `bytes`."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token: int) -> str | None: ...

    def is_special(self, token: int) -> bool: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; id 256 ends a document."""

    name = fingerprint = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    eod_id = BYTE_EOD
    boundary_tokens = BoundaryTokens(
        eod=BoundaryToken((BYTE_EOD,), "end of document", "as always with bytes"),
        no_eod_reason="",
        bos=None,
        adds_bos=False,
        special_tokens="plain",
    )

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < BYTE_EOD).decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        return None

    def id_to_token(self, token: int) -> str | None:
        return None

    def is_special(self, token: int) -> bool:
        return token == BYTE_EOD


def load_tokenizer(
    spec: str,
    *,
    eod: str | int | None = None,
    special_tokens: SpecialTokens | None = "plain",
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: See TOKENIZER_HELP.
        eod: End-of-document token or id, instead of the declared one.
        special_tokens: Treatment of text that spells a special token; None: as transformers does
            with the same files, which is to parse it unless they set otherwise.

    Raises:
        DataError: there is no such tokenizer, or `eod` is not in its vocabulary.
    """
    if spec == "bytes":
        if eod not in (None, BYTE_EOD) or special_tokens == "parse":
            setting = "--special-tokens parse" if eod in (None, BYTE_EOD) else f"--eod {eod}"
            raise DataError(f"{setting} has no effect with the tokenizer `bytes`; remove it")
        return ByteTokenizer()
    if (ranks := split_tiktoken_spec(spec)) is not None:
        return TiktokenTokenizer(*ranks, eod=eod, special_tokens=special_tokens)
    path = tokenizer_file(spec)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod=eod, special_tokens=special_tokens)
    return SentencePieceTokenizer(path, eod=eod, special_tokens=special_tokens)


def token_finder(spec: str) -> Callable[[str], int | None]:
    """Return the function of a tokenizer that maps a token to its id, or None.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    return load_tokenizer(spec).token_to_id


def tokenizer_fingerprint(spec: str) -> str:
    """Return the fingerprint of a tokenizer, if possible without loading it.

    Raises:
        DataError: there is no such tokenizer, or a file beside it cannot be read.
    """
    if spec == "bytes":
        return ByteTokenizer.fingerprint
    if (ranks := split_tiktoken_spec(spec)) is not None:
        return TiktokenTokenizer(*ranks).fingerprint
    path = tokenizer_file(spec)
    kind = hugging_face_files if path.suffix == ".json" else sentencepiece_files
    return kind.fingerprint_of(path)


def tokenizer_file(spec: str) -> Path:
    """Return the tokenizer file for `spec`, a file or directory; vocab.json implies merges.txt.

    Raises:
        DataError: there is no such file, or its kind is unknown.
    """
    path = Path(spec)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer {path}: no such file{cwd_hint(path)}; pass `bytes`, a tokenizer.json, a "
            "directory or a .model"
        )
    if path.suffix == ".tiktoken":
        raise DataError(
            f"tokenizer {path}: tiktoken ranks do not record how text is split; pass "
            f"{path}:ENCODING with one of {', '.join(ENCODINGS)}"
        )
    if path.suffix not in (".json", ".model"):
        raise DataError(
            f"tokenizer {path}: suffix {path.suffix or 'none'} found, .json (Hugging Face) or "
            ".model (SentencePiece) expected; pass a file of one of these kinds"
        )
    if path.name == VOCAB and not path.with_name(MERGES).is_file():
        raise DataError(f"tokenizer {path}: no {MERGES} beside it; get both, or a tokenizer.json")
    return path


def _file_in(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder}: no tokenizer.json, tokenizer.model or {VOCAB} with {MERGES} in it; check the "
        "tokenizer"
    )
