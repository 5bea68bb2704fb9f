"""Imports without garbage collections."""

from __future__ import annotations

import gc

import pytest

from parallel.cpu.collector import imports_uncollected


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_meanwhile_and_the_collector_is_then_as_it_was(enabled):
    collected = []
    watch = lambda phase, info: collected.append(phase)  # noqa: E731
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with imports_uncollected():
            gc.callbacks.append(watch)
            kept = [[number] for number in range(20 * gc.get_threshold()[0])]
            gc.callbacks.remove(watch)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert kept
    assert not collected
    assert gc.get_freeze_count() >= len(kept)


def test_the_collector_comes_back_after_an_import_that_fails():
    assert gc.isenabled()
    with pytest.raises(ImportError), imports_uncollected():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
