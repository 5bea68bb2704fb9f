"""The manifest of a checkpoint: its files, and the layout and configuration that wrote it.

`manifest.json` is written last, so a directory `step_N` that holds one is complete.
`verify_listing` and `verify_content` check that it is undamaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from parallel.checkpoint.errors import RESTORE, CheckpointError
from parallel.checkpoint.file_hashes import hash_files

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_FILE_NAME = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,3}"
)
_MAX_MANIFEST_BYTES = 256 * 1024**2


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Layout(_Record):
    """The parallel layout of the run that wrote a checkpoint."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    zero_stage: int = 0
    precision: str = "fp32"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Sizes of the axes; with equal sizes every rank has the same coordinates."""
        return self.tensor, self.pipeline, self.data

    def __str__(self) -> str:
        expert = f" (expert {self.expert})" if self.expert > 1 else ""
        return (
            f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}{expert}, "
            f"ZeRO-{self.zero_stage}, {self.precision}"
        )


class TextRecord(_Record):
    """Tokenization of the training text; None where that is not known.

    `eod_id` ends a document, `bos_ids` begin it (perhaps none). `special_tokens`: whether text that
    spells a special token became it (parse) or ordinary tokens (plain).
    """

    eod_id: int | None = None
    bos_ids: tuple[int, ...] | None = None
    special_tokens: Literal["parse", "plain"] | None = None


UNKNOWN_TEXT = TextRecord()


class FileEntry(_Record):
    """A file of the checkpoint, and the rank that wrote it and verifies it."""

    size: int
    sha256: str
    rank: int


class Manifest(_Record):
    """The contents of `manifest.json`; `config` is the run's, and `config["model"]` the model's."""

    format_version: int
    step: int
    layout: Layout
    config: dict[str, Any]
    text: TextRecord = UNKNOWN_TEXT
    fingerprints: dict[str, str]
    versions: dict[str, str]
    sharding: dict[str, tuple[int | None, int | None]]
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a file of a checkpoint")
        return files

    def to_bytes(self) -> bytes:
        return encode_manifest(self.model_dump(mode="json"))


def encode_manifest(content: Mapping[str, Any]) -> bytes:
    """Encode as canonical JSON that ends with a checksum of everything before it."""
    return _dump({**content, "checksum": _checksum(content)})


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode("ascii")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def step_of_name(name: str) -> int | None:
    """The N of a directory name `step_N`; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def load_manifest(path: Path) -> Manifest:
    """Read a manifest file and verify its checksum.

    Raises:
        CheckpointError: it is missing, damaged, of another format version, or names a file outside
            its directory.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(path.parent)!r} has no {path.name}, so it is incomplete; {RESTORE}"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror}); {RESTORE}"
        ) from error
    return _parse(raw, path)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint directory `step_N`.

    Raises:
        CheckpointError: as for `load_manifest`; or its step is not that of the directory's name, or
            it is reached through a symbolic link.
    """
    path = directory / MANIFEST_NAME
    if directory.is_symlink() or path.is_symlink():
        raise CheckpointError(
            f"{str(path)!r} is behind a symbolic link, which checkpoints never use; replace the "
            "link with the directory it points to"
        )
    manifest = load_manifest(path)
    if manifest.step != step_of_name(directory.name):
        raise CheckpointError(
            f"{str(path)!r} is of step {manifest.step}, not of {directory.name}; rename the "
            f"directory to step_{manifest.step}, or use another checkpoint"
        )
    return manifest


def decode_manifest(raw: bytes, path: Path, *, remedy: str = RESTORE) -> dict[str, Any]:
    """Decode what `encode_manifest` has encoded; `path` and `remedy` are for messages.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(raw.decode("ascii"))
        checksum = content.pop("checksum", None)
        expected = _checksum(content)  # ValueError: a number that JSON does not have
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: not a JSON object; {remedy}") from error
    if checksum != expected or raw != _dump({**content, "checksum": checksum}):
        raise CheckpointError(
            f"{str(path)!r} is damaged: its checksum does not match its content; {remedy}"
        )
    return content


def _parse(raw: bytes, path: Path) -> Manifest:
    content = decode_manifest(raw, path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format version {version}, this program reads {FORMAT_VERSION}: "
            "use the version of manyformer that wrote it"
        )
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{str(path)!r} is not a manifest: {place}: {first['msg']}; {RESTORE}"
        ) from error


def verify_listing(directory: Path, manifest: Manifest) -> str | None:
    """Describe the first file that is missing, surplus, a symbolic link or of another size.

    Returns None when there is none.
    """
    present: dict[str, os.stat_result] = {}
    for folder, folder_names, file_names in os.walk(directory):
        for name in (*folder_names, *file_names):
            path = Path(folder, name)
            if path.is_symlink():
                return f"{str(path)!r} is a symbolic link, which checkpoints never contain"
        for name in file_names:
            path = Path(folder, name)
            present[path.relative_to(directory).as_posix()] = path.stat()
    present.pop(MANIFEST_NAME, None)
    for name, entry in manifest.files.items():
        if name not in present:
            return f"{str(directory / name)!r} is missing"
        if present[name].st_size != entry.size:
            actual = present[name].st_size
            return f"{str(directory / name)!r} has {actual} bytes, expected {entry.size}"
    surplus = sorted(set(present) - set(manifest.files))
    if surplus:
        return f"{str(directory / surplus[0])!r} does not belong to the checkpoint: move it away"
    return None


def verify_content(directory: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """Describe the first of `names` whose sha256 differs from the manifest's; None if none does.

    Several files are hashed at a time; each name is taken from `names` when its file is begun.
    """
    paths = (directory / name for name in names)
    with contextlib.closing(hash_files(paths)) as hashed:
        for path, record, error in hashed:
            if record is None:
                return f"{str(path)!r} cannot be read: {error.strerror if error else ''}"
            expected = manifest.files[path.relative_to(directory).as_posix()].sha256
            if record.sha256 != expected:
                return f"{str(path)!r} is damaged: sha256 {record.sha256}, expected {expected}"
    return None
