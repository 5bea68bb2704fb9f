"""Print the code revision, host and package versions of a run."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path


def revision() -> str:
    """Return the checked-out commit, with `-dirty` if files differ from it.

    For an installed package, return its version: it may lie inside an unrelated repository.
    """
    root = code_root()
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() == root:
            return _git(root, "describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        pass
    if (root / "pyproject.toml").is_file():
        return "unknown (no git)"
    return f"manyformer {version('manyformer')}, installed in {root}"


def code_root() -> Path:
    """Return the root of the packages that a run imports: the clone that contains this file, or the
    installation if only the job scripts were copied."""
    clone = Path(__file__).resolve().parents[1]
    spec = find_spec("pretrain") if not (clone / "pretrain").is_dir() else None
    return clone if spec is None or not spec.origin else Path(spec.origin).resolve().parents[1]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def packages() -> list[str]:
    """Return NAME==VERSION of every installed distribution, sorted."""
    return sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)


if __name__ == "__main__":
    print(f"revision: {revision()}")
    print(f"host: {socket.gethostname()}, {platform.platform()}")
    print(f"python: {platform.python_version()}")
    print(f"packages: {' '.join(packages())}")
