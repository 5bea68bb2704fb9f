"""Print what a run is made of: the revision of the code and the versions of its packages."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def revision() -> str:
    """The commit that is checked out, with `-dirty` if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown (no git)"
    return done.stdout.strip()


def packages() -> list[str]:
    """NAME==VERSION of every installed distribution, sorted."""
    return sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)


if __name__ == "__main__":
    print(f"revision: {revision()}")
    print(f"host: {socket.gethostname()}, {platform.platform()}")
    print(f"python: {platform.python_version()}")
    print(f"packages: {' '.join(packages())}")
