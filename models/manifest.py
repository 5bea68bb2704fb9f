"""The manifest of a checkpoint directory as JSON: which model it is of. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})")


def find_manifest(path: Path) -> Path:
    """The manifest of a checkpoint (`step_N`), of its weights, or of a run's newest checkpoint.

    Raises:
        ValueError: there is none.
    """
    entries = path / "checkpoints"
    steps = [
        (int(match[1]), entry)
        for entry in (entries.iterdir() if entries.is_dir() else ())
        if (match := _STEP_NAME.fullmatch(entry.name)) and (entry / MANIFEST_NAME).is_file()
    ]
    newest = [max(steps)[1]] if steps else []
    for directory in (path, *newest, path.parent):
        if (directory / MANIFEST_NAME).is_file():
            return directory / MANIFEST_NAME
    raise ValueError(
        f"{path.absolute()} is no checkpoint and no run that has one; give the path of one"
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, exactly as it was written: its last entry is the checksum of the others.

    Raises:
        ValueError: it does not exist, or is not what was written.
    """
    try:
        raw = path.read_bytes()
        content: dict[str, Any] = json.loads(raw)
        checksum = content.pop("checksum")
        is_whole = checksum == _checksum(content) and raw == closed(content)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a checkpoint or a run") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not the JSON that was written") from error
    if not is_whole or "config" not in content:
        raise ValueError(f"{path} is damaged: its checksum does not match its content")
    return content


def closed(content: dict[str, Any]) -> bytes:
    """Canonical JSON, closed by a checksum over everything before it."""
    return _dump({**content, "checksum": _checksum(content)})


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode("ascii")
