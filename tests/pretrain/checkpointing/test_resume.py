"""Stopping, killing and continuing complete runs: the losses of an undisturbed one, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import curve, final_weights, tiny_run
from tests.tiers import tiered

STEPS = 6


def _config(data: Path, run_dir: Path, **changes):
    return tiny_run(data, run_dir=str(run_dir), training__max_steps=STEPS, **changes)


def _train(config, world_size: int = 1, *, stage: int = 1, entry=run_training) -> list[int]:
    return run_ranks(entry, world_size, config, f"configs/ds/zero{stage}.json", init=False)


def _markers(config) -> list[str]:
    """The markers of a run's end for launchers; a user's STOP would not be touched."""
    return sorted(path.name for path in Path(config.run_dir).iterdir() if path.name.isupper())


def _killed_at(step: int):
    """`run`, ended by SIGKILL as soon as training has taken `step` steps."""

    def entry(config, ds_config_path):
        from pretrain.engine.engine import PlainEngine, StageEngine

        for engine in (PlainEngine, StageEngine):
            original, count = engine.train_step, 0

            def train_step(self, *args, original=original, **kwargs):
                nonlocal count
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return original(self, *args, **kwargs)

            engine.train_step = train_step
        return run_training(config, ds_config_path)

    return entry


CASES = {
    "ZeRO-0": (1, 0, {}),
    "ZeRO-1": (1, 1, {}),
    "bf16": (1, 1, {"training__precision": "bf16"}),
    "data 2, ZeRO-2": (2, 2, {"training__batch_size": 2}),
    "data 2, ZeRO-3": (2, 3, {"training__batch_size": 2}),
    "pipeline 2": (2, 1, {"parallel__pipeline": 2}),
    "tensor 2, tied": (2, 1, {"parallel__tensor": 2, "model__tie_embeddings": True}),
    "documents apart": (1, 1, {"data__reset_at_documents": True}),
}


@pytest.mark.parametrize(
    "case",
    tiered(CASES, ["bf16", "data 2, ZeRO-3", "pipeline 2", "documents apart"]),
)
def test_a_killed_run_continues_with_the_losses_of_an_undisturbed_one(case, data, tmp_path):
    world_size, stage, changes = CASES[case]
    undisturbed = _config(data, tmp_path / "a", **changes)
    assert _train(undisturbed, world_size, stage=stage) == [EXIT_COMPLETED] * world_size
    killed = _config(data, tmp_path / "b", **changes)
    with pytest.raises(AssertionError, match="exit -9"):
        _train(killed, world_size, stage=stage, entry=_killed_at(5))
    assert _train(killed, world_size, stage=stage) == [EXIT_COMPLETED] * world_size
    assert curve(killed) == curve(undisturbed)
    expected = final_weights(undisturbed)
    for name, weight in final_weights(killed).items():
        assert torch.equal(weight, expected[name]), name


def _signalled(config, ds_config_path):
    """`run` on two ranks, of which the second is asked to stop in its third step."""
    from pretrain.engine.engine import PlainEngine

    original, count = PlainEngine.train_step, 0

    def train_step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 3 and self.ctx.data.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    PlainEngine.train_step = train_step
    return run_training(config, ds_config_path)


def test_a_signal_to_one_rank_makes_all_save_the_same_step_and_stop(data, tmp_path):
    undisturbed = _config(data, tmp_path / "a", training__batch_size=2)
    _train(undisturbed, 2)
    stopped = _config(data, tmp_path / "b", training__batch_size=2)
    assert _train(stopped, 2, entry=_signalled) == [EXIT_STOPPED] * 2
    assert Path(stopped.run_dir, "checkpoints", "latest").read_text().strip() == "step_3"
    assert _markers(stopped) == ["REQUEUE"]
    assert _train(stopped, 2) == [EXIT_COMPLETED] * 2
    assert _markers(stopped) == ["DONE"]
    assert curve(stopped)[:STEPS] == curve(undisturbed)[:STEPS]


def test_a_damaged_newest_checkpoint_falls_back_to_the_last_good_one_and_says_so(
    data, tmp_path, capfd
):
    config = _config(data, tmp_path / "run", checkpoint__keep=3)
    _train(config)
    undisturbed = curve(config)
    weights = Path(config.run_dir, "checkpoints", "step_6", "weights", "pp_00_tp_00.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = run_ranks(_captured_run, 1, config, init=False)[0]
    assert "step_6 is not used" in said
    assert "sha256" in said
    assert "continuing after step 4" in said
    assert curve(config) == undisturbed


def _captured_run(config) -> str:
    import contextlib
    import io
    import logging

    text = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(text))
    with contextlib.redirect_stdout(text):
        assert run_training(config, "configs/ds/zero1.json") == EXIT_COMPLETED
    return text.getvalue()


def _refused(config) -> str:
    with pytest.raises(ValueError) as error:
        run_training(config, "configs/ds/zero1.json")
    return str(error.value)


def test_resume_without_a_usable_checkpoint_is_refused_and_loses_nothing(data, tmp_path):
    config = _config(data, tmp_path / "run", resume="must")
    assert "resume=must" in run_ranks(_refused, 1, config, init=False)[0]
    _train(_config(data, tmp_path / "run", checkpoint__keep=1))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_6"
    never = _config(data, tmp_path / "run", resume="never")
    assert "resume=never" in run_ranks(_refused, 1, never, init=False)[0]
    another = _config(data, tmp_path / "run", model__hidden_size=64)
    message = run_ranks(_refused, 1, another, init=False)[0]
    assert "model.hidden_size" in message
    assert "32" in message
    assert "64" in message
    (checkpoint / "manifest.json").write_text("{}")
    damaged = run_ranks(_refused, 1, _config(data, tmp_path / "run"), init=False)[0]
    assert "no undamaged checkpoint" in damaged
    assert checkpoint.is_dir()


def test_only_the_newest_checkpoints_are_kept(data, tmp_path):
    config = _config(data, tmp_path / "run", checkpoint__interval=1, checkpoint__keep=2)
    _train(config)
    names = {path.name for path in Path(config.run_dir, "checkpoints").iterdir()}
    assert names == {"step_5", "step_6", "latest"}
    shutil.rmtree(config.run_dir)
