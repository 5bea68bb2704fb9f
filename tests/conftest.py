"""What holds for every test: the environment that libraries read while they are imported."""

from __future__ import annotations

import signal

import pytest

from parallel.cpu.compat import prepare_environment

prepare_environment()
# A shell starts what runs in its background with SIGINT ignored, and every process that a test
# starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reorder-sums",
        action="store_true",
        help="let every matrix product sum in an order that depends on its shapes",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--reorder-sums"):
        from tests.summation import reorder_sums

        reorder_sums()
