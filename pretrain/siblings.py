"""Make sure that imports of this project's other packages find them and not a user's folders.

The packages have everyday names, and `python -m` puts the current directory first on the search
path: a folder `models/` there would be imported in place of ours. `pretrain` and `models` hold the
same copy of this file, because a shared one could itself be hidden.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def use_siblings(*names: str) -> None:
    """Check that each name is importable as this project's package.

    Under `python -m` first remove the current directory from the search path, unless it is a clone
    of the project: no command imports anything from the directory in which it is started.

    Raises:
        ImportError: a name resolves to another package or module, or to nothing.
        SystemExit: the same in a command, after one line on standard error.
    """
    under_m = sys.argv[0] == "-m"  # its value while Python locates the module that it will run
    if under_m and not sys.flags.safe_path and Path(sys.path[0]).resolve() != _ROOT:
        del sys.path[0]
    for name in names:
        found = _location(name)
        if found != _ROOT / name:
            message = _describe(name, found)
            if under_m or Path(sys.argv[0]).name.split(" ")[0] == "manyformer":
                sys.stderr.write(f"error: {message}\n")
                raise SystemExit(2)
            raise ImportError(message)


def _location(name: str) -> Path | None:
    """The folder of a package, or the file of a module; None if there is neither."""
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


def _describe(name: str, found: Path | None) -> str:
    if found is None:
        return f"manyformer's package {name} is not in {_ROOT}; install manyformer again"
    return (
        f"{found} hides manyformer's package {name} in {_ROOT}; rename it, or take {found.parent} "
        "off PYTHONPATH or start from another directory"
    )
