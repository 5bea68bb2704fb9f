"""OUTPUT.corpus.json beside a converted corpus: its counts, checksums and origin.

The formats of other projects record no checksum, and most neither tokenizer nor end token. A corpus
that comes back from one of them gets its own again from this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.errors import DataError

VERSION = 1
# Finds damage, and costs a tenth of a copy where SHA-256, which is for adversaries, costs two.
HASH: Literal["xxh3_128"] = "xxh3_128"


Hash = Annotated[str, StringConstraints(pattern="^(xxh3_128|sha256):[0-9a-f]+$")]


class Manifest(BaseModel):
    """Counts, checksums and origin of a corpus in any format."""

    model_config = ConfigDict(frozen=True, strict=True)

    version: int = VERSION
    kind: str
    dtype: str
    num_documents: int
    num_tokens: int
    ids_hash: Hash | None
    """ALGORITHM:HEX of all ids, little-endian in `dtype`: that of a file which holds nothing else.
    None in memory alone, for a Megatron corpus, whose writer computes its own."""
    ends_hash: Hash | None
    """The same of all document ends in tokens, as little-endian int64; None: not recorded."""
    eod_id: int | None = None
    """Token that ends every document; None if there is none or it is not known."""
    bos_id: int | None = None
    """Token that begins every document, if that is how they were cut."""
    command: str = ""
    info: CorpusInfo | None = None
    """The .json of the Megatron corpus from which it was made."""

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


def manifest_path(output: Path) -> Path:
    """Return OUTPUT.corpus.json, which lies beside an output that is a folder."""
    return output.with_name(output.name + ".corpus.json")


def read_manifest(output: Path, *, kind: str) -> Manifest | None:
    """Read the manifest of a corpus; None if it has none, as one written by another project.

    Raises:
        DataError: the file is no manifest, or that of a corpus of another kind.
    """
    path = manifest_path(output)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "the file"
        raise DataError(
            f"{path}: {key}: {problem['msg']}; delete this file to read the corpus without its "
            "checks, or convert it again"
        ) from error
    if (manifest.version, manifest.kind) != (VERSION, kind):
        raise DataError(
            f"{path}: version {manifest.version} and kind {manifest.kind} found, {VERSION} and "
            f"{kind} expected; pass --from {manifest.kind}, or delete this file"
        )
    return manifest
