"""PREFIX.json beside PREFIX.bin and PREFIX.idx: counts, tokenizer and checksums of a corpus."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.errors import DataError
from data_tools.tokenization.special_tokens import SpecialTokens

VERSION = 2  # 1 had no checksum


class TextRules(NamedTuple):
    """Encoding rules of a corpus besides the tokenizer; None means unknown."""

    eod_id: int | None = None
    """Token that ends every document."""
    bos_ids: tuple[int, ...] | None = None
    """Tokens that begin every document; may be empty."""
    special_tokens: SpecialTokens | None = None
    """Treatment of text that spells a special token; `parse`: it may have become that token."""


class SourceInfo(BaseModel):
    """Counts of one `--input` argument."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    num_files: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_with_null_bytes: int
    """Documents with a null byte, which is kept as text."""
    left_out: dict[str, int]
    """Number of documents left out of the corpus, by problem."""


class CorpusInfo(BaseModel):
    """Counts and provenance of a .bin/.idx pair, which is complete without it."""

    # Unknown keys are accepted: later versions may add some.
    model_config = ConfigDict(frozen=True, strict=True)

    version: int = VERSION
    tokenizer: str
    """Tokenizer specification as passed: `bytes` or a path."""
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's file, or `bytes`."""
    vocab_size: int
    eod_id: int | None
    """Token that ends every document; None if none was appended."""
    bos_ids: tuple[int, ...] = ()
    """Tokens that begin every document."""
    special_tokens: SpecialTokens = "plain"
    """Treatment of text that spells a special token; `parse`: it may have become that token."""
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text: the denominator of bits per byte."""
    max_token_id: int
    bin_sha256: str
    idx_sha256: str
    command: str
    """The command line that wrote the corpus."""
    licence: str | None = None
    """Value of `--license`; the key keeps the spelling of existing files."""
    sources: tuple[SourceInfo, ...] = ()
    left_out_sha256: str | None = None
    """SHA-256 of PREFIX.left_out.jsonl; None if no document was left out."""

    @property
    def text_rules(self) -> TextRules:
        return TextRules(self.eod_id, self.bos_ids, self.special_tokens)

    def to_bytes(self) -> bytes:
        """Serialise to JSON that ends with a checksum over everything before it."""
        content = self.model_dump(mode="json")
        return _dump({**content, "checksum": _checksum(content)})


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode("ascii")


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def info_path(prefix: Path) -> Path:
    """Return the path of the sidecar, PREFIX.json."""
    return prefix.with_name(prefix.name + ".json")


def left_out_list(prefix: Path) -> Path:
    """Return PREFIX.left_out.jsonl, the list of documents left out of the corpus with reasons."""
    return prefix.with_name(prefix.name + ".left_out.jsonl")


def read_info(prefix: Path) -> CorpusInfo | None:
    """Read the sidecar of a corpus; None if it has none, as with files written by Megatron.

    Raises:
        DataError: the file is not a sidecar of this format, or was damaged or edited.
    """
    path = info_path(prefix)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    _check_undamaged(path, text)
    try:
        info = CorpusInfo.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "the file"
        raise DataError(
            f"{path}: {key}: {problem['msg']}; preprocess the corpus again, or delete this file "
            "to read the corpus without its checks"
        ) from error
    if info.version not in (1, VERSION):
        raise DataError(
            f"{path}: version {info.version} found, {VERSION} expected; preprocess the corpus again"
        )
    return info


def _check_undamaged(path: Path, text: bytes) -> None:
    """Verify the checksum; invalid JSON and version 1, which has none, are left to the caller."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict) or ("checksum" not in content and content.get("version") == 1):
        return
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content) or text != _dump({**content, "checksum": checksum}):
        raise DataError(
            f"{path}: its checksum does not match its content; it is damaged or was edited: "
            "preprocess the corpus again, or delete this file to read the corpus without its checks"
        )
