"""Exceptions for unusable data files and data settings."""

from __future__ import annotations

import os
from pathlib import Path


class DataError(ValueError):
    """Unusable data file or setting; the message is one line and names the remedy."""


class NoSuchFileError(DataError):
    """Path that does not exist or matches no file."""


def cwd_hint(path: str | os.PathLike[str]) -> str:
    """Suffix for a "no such file" message: the directory that a relative path was resolved in."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}, where relative paths begin"


def brief(error: BaseException, *, most: int = 120) -> str:
    """The message of a library's error on one line, its first `most` characters."""
    return " ".join(str(error).split())[:most]
