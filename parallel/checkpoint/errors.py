"""Checkpoint errors, and one-line error messages."""

from __future__ import annotations

from opcode import opmap

_OURS = ("data_tools", "models", "parallel", "pretrain")
# The remedy of every message about a damaged file.
RESTORE = "restore it from a copy, or use another checkpoint"


class AgreedError(ValueError):
    """An error raised identically on every rank, so that only the first rank reports it."""


class CheckpointError(AgreedError):
    """A checkpoint cannot be written, found or trusted; the message is one line for the user."""


def one_line(error: BaseException) -> str:
    """Format an error on one line, prefixed with its type unless it is one of ours."""
    text = str(error) if is_ours(error) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def is_ours(error: BaseException) -> bool:
    """Whether its message was written here: its type is ours, or a ValueError of a `raise` here."""
    if _is_in_ours(type(error).__module__):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        type(error) is ValueError
        and trace is not None
        and _is_in_ours(trace.tb_frame.f_globals.get("__name__", ""))
        # A function in C, such as int("x"), has no frame of its own.
        and trace.tb_frame.f_code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]
    )


def _is_in_ours(module: str) -> bool:
    return module.partition(".")[0] in _OURS


def brief(error: BaseException, *, most: int = 120) -> str:
    """The message of a library's error on one line, its first `most` characters."""
    return " ".join(str(error).split())[:most]
