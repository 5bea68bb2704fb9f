"""Text to token ids and back: Hugging Face, SentencePiece and tiktoken files, raw bytes.

The libraries are imported when a tokenizer of their kind is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, cast

from data_tools.byte_bpe import FastByteBpe
from data_tools.byte_dataset import BYTE_EOD, BYTE_VOCAB_SIZE
from data_tools.errors import DataError, looked_up
from data_tools.tiktoken_files import RULES, TiktokenTokenizer, split_spec

TOKENIZER_HELP = (
    "bytes; a tokenizer.json, or a directory with one; a SentencePiece .model; or FILE:RULES, a "
    f"file of tiktoken ranks and how text is split ({', '.join(RULES)})"
)
_EOD_CANDIDATES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<eod>",
    "<|eos|>",
    "[EOS]",
)


class Tokenizer(Protocol):
    """What every tokenizer offers; special tokens in the text are encoded as ordinary text."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int:
        """Token that ends a document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file, or `bytes`."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 ends a document."""

    vocab_size = BYTE_VOCAB_SIZE
    eod_id = BYTE_EOD
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTE_EOD).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json, through the `tokenizers` library.

    Raises:
        DataError: the file cannot be read, or names no end-of-document token.
    """

    def __init__(self, path: Path, *, eod: str | None) -> None:
        self.fingerprint = _sha256(path)
        self._backend = _open_hugging_face(path)
        # Text that spells a special token must not become that token.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.eod_id = self._find_eod(path, eod)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        fast = self._fast
        ids = [None if fast is None else fast.encode(text) for text in texts]
        left = [number for number, found in enumerate(ids) if found is None]
        encodings = self._backend.encode_batch_fast(
            [texts[number] for number in left], add_special_tokens=False
        )
        for number, encoding in zip(left, encodings, strict=True):
            ids[number] = encoding.ids
        return cast(list[list[int]], ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def _fast(self) -> FastByteBpe | None:
        return FastByteBpe.of(self._backend)

    def _find_eod(self, path: Path, eod: str | None) -> int:
        candidates = _EOD_CANDIDATES if eod is None else (eod,)
        declared = _declared_eos(path.with_name("tokenizer_config.json")) if eod is None else None
        for candidate in (*([declared] if declared else []), *candidates):
            token = self._backend.token_to_id(candidate)
            if token is not None:
                return token
        raise _no_eod(path, candidates)


class SentencePieceTokenizer:
    """A SentencePiece .model.

    Raises:
        DataError: the file cannot be read, or has no end-of-document piece.
    """

    def __init__(self, path: Path, *, eod: str | None) -> None:
        self.fingerprint = _sha256(path)
        self._backend = _open_sentencepiece(path)
        self.vocab_size: int = self._backend.get_piece_size()
        self.eod_id = self._find_eod(path, eod)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def _find_eod(self, path: Path, eod: str | None) -> int:
        if eod is None and self._backend.eos_id() >= 0:
            return self._backend.eos_id()
        candidates = _EOD_CANDIDATES if eod is None else (eod,)
        for candidate in candidates:
            token = _piece_id(self._backend, candidate)
            if token is not None:
                return token
        raise _no_eod(path, candidates)


def load_tokenizer(spec: str, *, eod: str | None = None) -> Tokenizer:
    """Load a tokenizer: see TOKENIZER_HELP for what `spec` may be.

    `eod` names the token that ends a document where the file does not.

    Raises:
        DataError: there is no such tokenizer, or it has no end-of-document token.
    """
    if spec == "bytes":
        if eod is not None:
            raise DataError(f"--eod {eod} has no effect with the tokenizer `bytes`; remove it")
        return ByteTokenizer()
    if (ranks := split_spec(spec)) is not None:
        if eod is not None:
            raise DataError(f"--eod {eod} has no effect with {spec}, which names one; remove it")
        return TiktokenTokenizer(*ranks)
    path = _tokenizer_file(Path(spec))
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod=eod)
    return SentencePieceTokenizer(path, eod=eod)


def token_finder(spec: str) -> Callable[[str], int | None]:
    """Token -> id of a tokenizer.json or a SentencePiece .model, None for what it does not have.

    Unlike `load_tokenizer` it needs no end-of-document token.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    path = _tokenizer_file(Path(spec))
    if path.suffix == ".json":
        return _open_hugging_face(path).token_to_id
    return partial(_piece_id, _open_sentencepiece(path))


def tokenizer_fingerprint(spec: str) -> str:
    """The fingerprint of a tokenizer, without loading it.

    Raises:
        DataError: there is no such tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer.fingerprint
    if (ranks := split_spec(spec)) is not None:
        return TiktokenTokenizer(*ranks).fingerprint
    return _sha256(_tokenizer_file(Path(spec)))


def _open_hugging_face(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{path}: not a tokenizer.json ({_one_line(error)}); give the path of one"
        ) from error


def _open_sentencepiece(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{path}: not a SentencePiece model ({_one_line(error)}); give the path of one"
        ) from error


def _piece_id(backend: Any, piece: str) -> int | None:
    """The id of a piece; the library gives that of the unknown piece for what it does not have."""
    token: int = backend.piece_to_id(piece)
    return token if backend.id_to_piece(token) == piece else None


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        for file in found:
            if file.is_file():
                return file
        raise DataError(f"{path}: no tokenizer.json or tokenizer.model in it; check the tokenizer")
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
    return path


def _declared_eos(path: Path) -> str | None:
    """`eos_token` of a tokenizer_config.json, a string or an object with `content`."""
    if not path.is_file():
        return None
    try:
        token: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object ({_one_line(error)}); repair it") from error
    return token.get("content") if isinstance(token, dict) else token


def _no_eod(path: Path, candidates: Sequence[str]) -> DataError:
    return DataError(
        f"{path}: none of {' '.join(candidates)} is in its vocabulary, so no token ends a "
        "document; name one with --eod TOKEN"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
