"""The exceptions that bad data and bad data settings raise."""

from __future__ import annotations

import os
from pathlib import Path


class DataError(ValueError):
    """A data file or data setting that cannot be used; the message is one line with a remedy."""


class NoSuchFileError(DataError):
    """A path with nothing behind it."""


def looked_up(path: str | os.PathLike[str]) -> str:
    """Where a relative path was looked up, as the end of a message that it leads to nothing."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}, where relative paths begin"
