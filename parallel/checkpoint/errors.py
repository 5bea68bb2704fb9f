"""Checkpoint errors, and one-line error messages."""

from __future__ import annotations

_OURS = ("data_tools", "models", "parallel", "pretrain")
# The remedy of every message about a damaged file.
RESTORE = "restore it from a copy, or use another checkpoint"


class AgreedError(ValueError):
    """An error raised identically on every rank, so that only the first rank reports it."""


class CheckpointError(AgreedError):
    """A checkpoint cannot be written, found or trusted; the message is one line for the user."""


def one_line(error: BaseException) -> str:
    """Format an error on one line, prefixed with its type unless it is one of ours."""
    ours = type(error).__module__.partition(".")[0] in _OURS
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def brief(error: BaseException, *, most: int = 120) -> str:
    """The message of a library's error on one line, its first `most` characters."""
    return " ".join(str(error).split())[:most]
