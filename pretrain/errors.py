"""What ends a run with one line instead of a traceback, and the exit codes that go with it."""

from __future__ import annotations

from parallel.checkpoint.errors import AgreedError

EXIT_COMPLETED = 0
EXIT_CRASHED = 1  # a defect of this program, with its traceback; also what torchrun makes of others
EXIT_USER_ERROR = 2  # a setting, the data or a checkpoint cannot be used
EXIT_HUNG = 4  # a rank stood still
EXIT_NOT_FINITE = 5  # steps are not finite, ranks have come to differ, or the loss keeps leaping
EXIT_LOST_RANK = 6  # another rank has ended, which says why if it can
EXIT_OUT_OF_MEMORY = 7
EXIT_STOPPED = 75  # saved on request; start again to continue


class ConfigError(ValueError):
    """A setting that cannot be used. One line: key, value, constraint, remedy."""


class TrainingError(AgreedError):
    """Training cannot go on from here."""


class RendezvousError(ValueError):
    """The ranks of a run do not meet. One line, from each rank that knows it."""


class LostRankError(RuntimeError):
    """Another rank has ended. `said`: it, or a rank beside this one, has told the user."""

    def __init__(self, message: str, *, is_reported: bool) -> None:
        super().__init__(message)
        self.is_reported = is_reported


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a device."""
    # torch.OutOfMemoryError by name: the command line is checked before torch is imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
