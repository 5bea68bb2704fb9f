"""Python's garbage collector while modules are imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def imports_uncollected() -> Iterator[None]:
    """Import without garbage collections, and exempt what there is from all later ones.

    Modules stay until the process ends. A collection in between looks at every object of those that
    are already there, which was a fifth of the CPU time of a rank's imports, and one afterwards
    would do so again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
