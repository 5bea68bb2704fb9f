"""Python's garbage collector while modules are imported."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def imports_uncollected() -> Iterator[None]:
    """Import without garbage collections, and exempt what there is then from all later ones.

    Modules stay until the process ends. A collection in between looks at every object of those that
    are already there, which was a fifth of the CPU time of a rank's imports, and one afterwards
    would do so again. Nothing becomes exempt where everything had been imported before.
    """
    was_enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if was_enabled:
            gc.enable()
