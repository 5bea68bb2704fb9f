"""Errors that end a run with one line instead of a traceback, and the exit codes of a run."""

from __future__ import annotations

from parallel.checkpoint.errors import AgreedError

EXIT_COMPLETED = 0
EXIT_CRASHED = 1  # a bug of this program, with a traceback; torchrun also maps all others to it
EXIT_USER_ERROR = 2  # an unusable setting, corpus or checkpoint
EXIT_HUNG = 4  # a rank hung
EXIT_NOT_FINITE = 5  # non-finite steps, diverged ranks, or repeated loss spikes
EXIT_LOST_RANK = 6  # another rank exited; it reports the reason if it can
EXIT_OUT_OF_MEMORY = 7
EXIT_STOPPED = 75  # saved on request; start again to continue


class ConfigError(ValueError):
    """A setting that cannot be used. One line: key, value, constraint, remedy."""


class TrainingError(AgreedError):
    """Training cannot continue."""


class RendezvousError(ValueError):
    """A failed rendezvous. One line, from each rank that notices it."""


class LostRankError(RuntimeError):
    """Another rank has exited. `is_reported`: a rank has already reported it."""

    def __init__(self, message: str, *, is_reported: bool) -> None:
        super().__init__(message)
        self.is_reported = is_reported


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device ran out of memory."""
    # torch.OutOfMemoryError by name: the command line is checked before torch is imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
