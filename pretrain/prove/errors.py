"""The error of a run that did not end well."""

from __future__ import annotations


class RunFailedError(Exception):
    """A run that did not end well; one line that names the rank and what it said. `code`: its exit
    code, see `pretrain.prove.ranks.Ended`."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
