"""Everything in this folder carries the marker `gpu` and is skipped without a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.device import DEVICE

# cuBLAS reads it when it starts; without it deterministic algorithms are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = DEVICE.type == "cuda" and not torch.cuda.is_available()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        # What a driver or a card warns about is not what these tests are about.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if missing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def process_device() -> Iterator[torch.device]:
    """The device of an initialised process group of one, as a run has it."""
    from pretrain.distributed.process_groups import process_group

    with process_group() as device:
        assert device.type == DEVICE.type
        yield device


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
