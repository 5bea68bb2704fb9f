"""Print what a run is made of: the revision of the code and the versions of its packages."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path


def revision() -> str:
    """The commit that is checked out, with `-dirty` if files differ from it.

    An installed package has no commit, though it may lie in a repository of somebody else's:
    its version.
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
    """The folder of the packages that a run imports: the clone of this file, or where they are
    installed when only the job scripts have been copied here."""
    clone = Path(__file__).resolve().parents[1]
    spec = find_spec("pretrain") if not (clone / "pretrain").is_dir() else None
    return clone if spec is None or not spec.origin else Path(spec.origin).resolve().parents[1]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def packages() -> list[str]:
    """NAME==VERSION of every installed distribution, sorted."""
    return sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)


if __name__ == "__main__":
    print(f"revision: {revision()}")
    print(f"host: {socket.gethostname()}, {platform.platform()}")
    print(f"python: {platform.python_version()}")
    print(f"packages: {' '.join(packages())}")
