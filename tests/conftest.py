"""Settings of all tests: the environment that libraries read while they are imported."""

from __future__ import annotations

import gc
import random
import signal
import sys
from pathlib import Path

import pytest

from parallel.cpu.compat import prepare_environment

prepare_environment()
# A shell starts what runs in its background with SIGINT ignored, and every process that a test
# starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that mostly wait (for Slurm, launchers, kills) or take minutes: begun first, they leave no
# worker alone at the end.
_FIRST = (
    "launchers",
    "pretrain/supervision",
    "faults",
    "hostile",
    "pretrain/test_launch.py",
    "pretrain/prove",
    "pretrain/layouts",
    "pretrain/stability",
    "models/test_contributing.py",
    "test_packaging.py",
    "museum",
    "models/hf",
    "models/test_contract.py",
    "pretrain/checkpointing",
    "models/dynamic",
)


# Files that compare what different products have summed.
_SUMS = (
    "models",
    "parallel",
    "pretrain/engine/test_engine.py",
    "pretrain/layouts/test_daria_former_run.py",
    "pretrain/layouts/test_layouts.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reorder-sums",
        action="store_true",
        help="let every matrix product sum in an order that depends on its shapes, in the files "
        "that compare such sums; the others keep the order of torch",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures: the same draws in whatever order tests run, and the order of sums."""
    random.seed(0)
    # Only what is imported: tests of commands need neither.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if item.config.getoption("--reorder-sums"):
        from tests.summation import reorder_sums, sum_in_own_order

        (reorder_sums if _name(item).startswith(_SUMS) else sum_in_own_order)()


def pytest_collection_finish() -> None:
    """Spare garbage collections what was imported, and have fewer: 5 % of the suite's CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files as `_FIRST` says; a file's tests stay together, in their order."""

    def rank(item: pytest.Item) -> int:
        name = _name(item)
        places = [number for number, first in enumerate(_FIRST) if name.startswith(first)]
        return places[0] if places else len(_FIRST)

    items.sort(key=rank)


def _name(item: pytest.Item) -> str:
    """The path of its file below this folder, or ""."""
    folder = Path(__file__).parent
    return item.path.relative_to(folder).as_posix() if item.path.is_relative_to(folder) else ""
