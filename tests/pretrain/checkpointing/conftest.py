"""A run directory with two checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pretrain.checkpointing.fixtures import contents, open_store


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 9 and 10."""
    store = open_store(tmp_path / "run")
    store.save(contents(9))
    torch.rand(1)  # the two checkpoints hold different generator states
    store.save(contents(10))
    store.close()
    return tmp_path / "run"
