"""`pretrain/train.py` from its start to its end on the device: saves, a kill, and going on."""

from __future__ import annotations

import pytest

from tests.gpu.device_runs import DeviceRun
from tests.pretrain.tiny_run import curve, final_weights, metrics

STEPS, SAVED = 120, 20
SETTINGS = {
    "training__max_steps": STEPS,
    "training__precision": "bf16",
    "checkpoint__interval": SAVED,
    "checkpoint__keep": 3,
    "evaluation__interval": 60,
    "data__num_workers": 1,
}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_killed_run_goes_on_as_if_it_had_not_been(asynchronous, tmp_path):
    settings = SETTINGS | {"checkpoint__asynchronous": asynchronous}
    whole = DeviceRun(tmp_path / "whole", **settings)
    whole.complete()
    killed = DeviceRun(tmp_path / "killed", **settings)
    killed.kill_after(2 * SAVED)
    assert "continuing after step" in killed.complete()
    # Kernels of CUDA may sum in another order in every run (embeddings), which a step of Adam
    # makes as large as the rate where a gradient is all but zero.
    for expected, found in zip(curve(whole.config), curve(killed.config), strict=True):
        assert found == pytest.approx(expected, rel=2e-2)
    before, after = final_weights(whole.config), final_weights(killed.config)
    assert before.keys() == after.keys()


def test_a_run_learns_and_says_what_device_it_is_on(tmp_path):
    run = DeviceRun(tmp_path / "run", **SETTINGS)
    assert " on 1 x " in run.complete()
    trained, evaluated = metrics(run.config)
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
    assert len(evaluated) == STEPS // 60
