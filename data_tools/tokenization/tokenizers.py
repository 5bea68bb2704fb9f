"""Text to token ids and back: Hugging Face, SentencePiece and tiktoken files, raw bytes.

The libraries are imported when a tokenizer of their kind is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from data_tools.errors import DataError, looked_up
from data_tools.tokenization import hugging_face_files, sentencepiece_files
from data_tools.tokenization.byte_vocabulary import BYTE_EOD, BYTE_VOCAB_SIZE
from data_tools.tokenization.document_marks import Mark, Marks
from data_tools.tokenization.hugging_face_files import MERGES, VOCAB, HuggingFaceTokenizer
from data_tools.tokenization.sentencepiece_files import SentencePieceTokenizer
from data_tools.tokenization.special_tokens import SpecialTokens
from data_tools.tokenization.tiktoken_files import RULES, TiktokenTokenizer, split_spec

TOKENIZER_HELP = (
    "bytes; a tokenizer.json, or a directory with one; a directory with vocab.json and merges.txt; "
    "a SentencePiece .model; or FILE:RULES, a file of tiktoken ranks and how text is split "
    f"({', '.join(RULES)})"
)
_FILES = ("tokenizer.json", "tokenizer.model", VOCAB)


class Tokenizer(Protocol):
    """What every tokenizer offers. What begins and ends a document is up to the caller."""

    @property
    def name(self) -> str:
        """Its file, for messages."""

    @property
    def vocab_size(self) -> int:
        """One more than its largest id."""

    @property
    def marks(self) -> Marks:
        """What may begin and end a document, and who says so."""

    @property
    def eod_id(self) -> int | None:
        """Token that ends a document; None where nothing says which."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file and of what files beside it add, or `bytes`."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token: int) -> str | None: ...

    def is_special(self, token: int) -> bool: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 ends a document."""

    name = fingerprint = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    eod_id = BYTE_EOD
    marks = Marks(
        end=Mark((BYTE_EOD,), "end of document", "as always with bytes"),
        no_end="",
        begin=None,
        begins_documents=False,
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
    """Load a tokenizer: see TOKENIZER_HELP for what `spec` may be.

    `eod`: the token or id that ends a document, in place of what the tokenizer's files declare.
    `special_tokens`: what becomes of text that spells one; None: what transformers does with the
    same files, which is to parse it unless they say otherwise.

    Raises:
        DataError: there is no such tokenizer, or it does not have the token `eod`.
    """
    if spec == "bytes":
        if eod not in (None, BYTE_EOD) or special_tokens == "parse":
            setting = "--special-tokens parse" if eod in (None, BYTE_EOD) else f"--eod {eod}"
            raise DataError(f"{setting} has no effect with the tokenizer `bytes`; remove it")
        return ByteTokenizer()
    if (ranks := split_spec(spec)) is not None:
        return TiktokenTokenizer(*ranks, eod=eod, special_tokens=special_tokens)
    path = tokenizer_file(spec)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod=eod, special_tokens=special_tokens)
    return SentencePieceTokenizer(path, eod=eod, special_tokens=special_tokens)


def token_finder(spec: str) -> Callable[[str], int | None]:
    """Token -> id of a tokenizer, None for what it does not have.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    return load_tokenizer(spec).token_to_id


def tokenizer_fingerprint(spec: str) -> str:
    """The fingerprint of a tokenizer, as far as possible without loading it.

    Raises:
        DataError: there is no such tokenizer, or a file beside it cannot be read.
    """
    if spec == "bytes":
        return ByteTokenizer.fingerprint
    if (ranks := split_spec(spec)) is not None:
        return TiktokenTokenizer(*ranks).fingerprint
    path = tokenizer_file(spec)
    kind = hugging_face_files if path.suffix == ".json" else sentencepiece_files
    return kind.fingerprint_of(path)


def tokenizer_file(spec: str) -> Path:
    """The file that `spec`, a file or a directory, means; vocab.json stands for merges.txt as well.

    Raises:
        DataError: there is no such file, or it is of no known kind.
    """
    path = Path(spec)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer {path}: no such file{looked_up(path)}; give `bytes`, a tokenizer.json, a "
            "directory or a .model"
        )
    if path.suffix == ".tiktoken":
        raise DataError(
            f"tokenizer {path}: tiktoken ranks do not say how text is split; give {path}:RULES, "
            f"with one of {', '.join(RULES)}"
        )
    if path.suffix not in (".json", ".model"):
        raise DataError(
            f"tokenizer {path}: suffix {path.suffix or 'none'} found, .json (Hugging Face) or "
            ".model (SentencePiece) expected"
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
