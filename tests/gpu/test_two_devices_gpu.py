"""Runs on two devices over NCCL against the run on one: skipped where there is one.

python3 -m pytest tests/gpu/test_two_devices_gpu.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.device import DEVICE
from tests.gpu.device_runs import DeviceRun
from tests.pretrain.tiny_run import metrics, zero_file

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
SETTINGS = {
    "training__max_steps": 6,
    "training__precision": "bf16",
    "training__batch_size": 4,
    "checkpoint__interval": 3,
    "evaluation__interval": 6,
}
DATA_2 = {"training__batch_size": 2}
LAYOUTS = {
    "tensor": {"parallel__tensor": 2},
    "tensor and sequence": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "pipeline": {"parallel__pipeline": 2},
    "data, ZeRO-1": DATA_2,
    "data, ZeRO-2": DATA_2 | {"zero": 2},
    "data, ZeRO-3": DATA_2 | {"zero": 3},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict[str, float]]:
    run = DeviceRun(tmp_path_factory.mktemp("alone") / "run", **SETTINGS)
    run.complete()
    return metrics(run.config)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_devices_train_as_one(layout, alone, tmp_path: Path):
    changes = dict(LAYOUTS[layout])
    zero = changes.pop("zero", None)
    run = DeviceRun(tmp_path / "run", ranks=2, **SETTINGS | changes)
    if zero is not None:
        run.command += ["--ds_config", zero_file(zero, tmp_path)]
    run.complete()
    for expected, found in zip(alone, metrics(run.config)[0], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
