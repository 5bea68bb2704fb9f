"""Imports without garbage collections."""

from __future__ import annotations

import gc
import sys
from types import ModuleType

import pytest

from parallel.cpu.collector import imports_uncollected


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_meanwhile_and_the_collector_is_then_as_it_was(enabled, monkeypatch):
    collected = []

    def watch(phase, info):
        collected.append(phase)

    was_enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with imports_uncollected():
            monkeypatch.setitem(sys.modules, "imported_now", ModuleType("imported_now"))
            gc.callbacks.append(watch)
            kept = [[number] for number in range(20 * gc.get_threshold()[0])]
            gc.callbacks.remove(watch)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert not collected
    assert gc.get_freeze_count() >= frozen + len(kept)


def test_nothing_becomes_exempt_where_everything_was_there():
    """Or garbage of one run would stay through all others of a process."""
    frozen = gc.get_freeze_count()
    with imports_uncollected():
        import json  # noqa: F401
    assert gc.get_freeze_count() == frozen


def test_the_collector_comes_back_after_an_import_that_fails():
    assert gc.isenabled()
    with pytest.raises(ImportError), imports_uncollected():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
