"""What ends a run with one line instead of a traceback, and the exit codes that go with it."""

from __future__ import annotations

EXIT_COMPLETED = 0
EXIT_USER_ERROR = 2  # a setting, the data or a checkpoint cannot be used
EXIT_HUNG = 4  # a rank stood still
EXIT_NOT_FINITE = 5  # steps are not finite, ranks have come to differ, or the loss keeps leaping
EXIT_STOPPED = 75  # saved on request; start again to continue


class ConfigError(ValueError):
    """A setting that cannot be used. One line: key, value, constraint, remedy."""


class AgreedError(ValueError):
    """An error that every rank raises alike, so that the first one's line is enough."""


class CheckpointError(AgreedError):
    """A checkpoint that cannot be written, found or trusted; one line for the user."""


class TrainingError(AgreedError):
    """Training cannot go on from here."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with its type unless it is one of ours."""
    ours = type(error).__module__.partition(".")[0] in ("pretrain", "parallel", "data_tools")
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
