"""PREFIX.json beside PREFIX.bin and PREFIX.idx: what a corpus holds, which tokenizer made it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.errors import DataError


class SourceInfo(BaseModel):
    """What one `--input` argument gave."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    num_files: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_with_null_bytes: int
    """Documents with a null byte, which is text like any other and kept."""
    left_out: dict[str, int]
    """Documents that are not in the corpus, by the kind of problem."""


class CorpusInfo(BaseModel):
    """Counts and provenance of one .bin/.idx pair; the two files are complete without it."""

    # Unknown keys pass: later versions may add some.
    model_config = ConfigDict(frozen=True, strict=True)

    version: int = 1
    tokenizer: str
    """Tokenizer specification as it was given: `bytes` or a path."""
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's file, or `bytes`."""
    vocab_size: int
    eod_id: int | None
    """Token that ends every document; None when none was appended."""
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text: what bits per byte divides by."""
    max_token_id: int
    bin_sha256: str
    idx_sha256: str
    command: str
    """The command line that wrote the corpus."""
    licence: str | None = None
    """What `--licence` said of the text."""
    sources: tuple[SourceInfo, ...] = ()


def info_path(prefix: Path) -> Path:
    """PREFIX.json."""
    return prefix.with_name(prefix.name + ".json")


def read_info(prefix: Path) -> CorpusInfo | None:
    """The sidecar of a corpus, or None when it has none, as for files that Megatron wrote.

    Raises:
        DataError: the file exists and is not a sidecar of this format.
    """
    path = info_path(prefix)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        info = CorpusInfo.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise DataError(
            f"{path}: {where}: {problem['msg']}; preprocess the corpus again, or delete this file "
            "to read the corpus without its checks"
        ) from error
    if info.version != 1:
        raise DataError(
            f"{path}: version {info.version} found, 1 expected; preprocess the corpus again"
        )
    return info
