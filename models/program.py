"""The name of a command line in its usage."""

from __future__ import annotations

import sys
from pathlib import Path


def program(otherwise: str) -> str:
    """The command that was typed, if it was `manyformer NAME`."""
    typed = Path(sys.argv[0]).name
    return typed if typed.startswith("manyformer ") else otherwise
