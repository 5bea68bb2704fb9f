from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.checkpoint.errors import CheckpointError
from pretrain.checkpointing.rng_state import restore_rng_state, rng_states, write_rng_state
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=CheckpointError)


def draw() -> list[float]:
    """An odd number of Gaussians, so that a pending second one is part of the state."""
    return [
        random.gauss(0, 1),
        random.random(),
        np.random.normal(),  # noqa: NPY002
        np.random.random(),  # noqa: NPY002
        torch.randn(3).sum().item(),
    ]


@pytest.mark.parametrize("draws_before", [0, 1, 2])
def test_restored_generators_repeat_what_they_drew(tmp_path: Path, draws_before: int) -> None:
    for _ in range(draws_before):
        draw()
    with (tmp_path / "rng").open("wb") as file:
        write_rng_state(file, rng_states())
    expected = [draw() for _ in range(3)]

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    restore_rng_state(tmp_path / "rng")

    assert [draw() for _ in range(3)] == expected


def test_states_of_another_kind_of_device_are_refused(tmp_path: Path) -> None:
    name = "torch.other"
    with (tmp_path / "rng").open("wb") as file:
        write_rng_state(file, rng_states() | {name: torch.get_rng_state()})
    with _refused(str(tmp_path), value=name, constraint="generators", remedy="kind of device"):
        restore_rng_state(tmp_path / "rng")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rng").write_bytes(b"not safetensors")
    with _refused(str(tmp_path), value="rng", constraint="cannot be read", remedy="copy"):
        restore_rng_state(tmp_path / "rng")
