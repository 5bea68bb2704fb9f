"""Errors of checkpoints, and an error's text on one line."""

from __future__ import annotations

_OURS = ("data_tools", "models", "parallel", "pretrain")


class AgreedError(ValueError):
    """An error that every rank raises alike, so that the first one's line is enough."""


class CheckpointError(AgreedError):
    """A checkpoint that cannot be written, found or trusted; one line for the user."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with its type unless it is one of ours."""
    ours = type(error).__module__.partition(".")[0] in _OURS
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
