"""Runs that cannot be resumed at another layout, or saved, are refused in one line by all ranks."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import yaml

from parallel.checkpoint.tensor_file import TensorFile
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.checkpointing.index import parse_index
from pretrain.engine import engine
from tests.distributed import run_ranks
from tests.pretrain.layout import Layout
from tests.pretrain.layouts.layout_runs import (
    LAYOUTS,
    SAVED,
    STEPS,
    Origin,
    Runs,
    begin_at_checkpoint,
    tail,
    train,
)
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import SEQ
from tests.tolerance import FP32_LOSS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("origins"))


def refusal(config, place: Layout) -> str:
    """The line with which a run at `place` ends, the same on all ranks."""
    arguments = (config, f"configs/ds/zero{place.stage}.json")
    lines = set(run_ranks(_refused, place.world_size, *arguments, init=False))
    assert len(lines) == 1
    return lines.pop()


def _refused(config, ds_config_path) -> str:
    with pytest.raises(ValueError) as error:
        run_training(config, ds_config_path)
    return str(error.value)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def killed_while_restoring(config, ds_config_path: str) -> int:
    """`run`, of which every rank is killed when half of the state is in place."""
    read, count = TensorFile.read, 0

    def read_or_die(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, *args, **kwargs)

    TensorFile.read = read_or_die
    return run_training(config, ds_config_path)


def test_a_kill_while_restoring_changes_nothing_in_the_checkpoint(runs, tmp_path):
    origin = runs.origin("llama", "fp32", "PP2 TP2")
    begin_at_checkpoint(origin, tmp_path)
    config = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path)
    before = files(tmp_path / "checkpoints")
    with pytest.raises(AssertionError, match="exit -9"):
        train(config, LAYOUTS["ZeRO-1 DP2"], killed_while_restoring)
    assert files(tmp_path / "checkpoints") == before
    train(config, LAYOUTS["ZeRO-1 DP2"])
    assert [r["loss"] for r in tail(config)[0]] == pytest.approx(
        [r["loss"] for r in origin.curve], rel=FP32_LOSS
    )


def test_a_parameter_that_is_missing_at_the_new_layout_stops_every_rank(runs, tmp_path):
    begin_at_checkpoint(runs.origin("llama", "fp32", "PP2 TP2"), tmp_path)
    config = runs.config("llama", "fp32", "PP4", tmp_path)
    message = run_ranks(without_a_stage, 4, config, "configs/ds/zero1.json", init=False)
    assert len(set(message)) == 1
    assert "has no state of parameter" in message[0]


def without_a_stage(config, ds_config_path: str) -> str:
    """The checkpoint as a writer would have left it that forgot what the last stage holds."""
    read = engine.read_index

    def forgetful(checkpoint):
        index = parse_index(read(checkpoint), source=checkpoint)
        left = {n: e for n, e in index.optimizer.items() if not n.startswith("block_3")}
        return index._replace(optimizer=left).to_bytes()

    engine.read_index = forgetful
    return _refused(config, ds_config_path)


def with_one_step_less(config, ds_config_path: str) -> str:
    """The checkpoint as ZeRO-0 writes it when a parameter got no gradient in one of its steps."""
    read = engine.read_index

    def changed(checkpoint):
        index = parse_index(read(checkpoint), source=checkpoint)
        entry = index.optimizer["head.norm.weight"]
        entry.pieces[:] = [(*piece[:4], SAVED - 1) for piece in entry.pieces]
        return index.to_bytes()

    engine.read_index = changed
    return _refused(config, ds_config_path)


def test_step_counts_that_one_zero_stage_cannot_keep_apart_are_refused(runs, tmp_path):
    begin_at_checkpoint(runs.origin("llama", "fp32", "PP2 TP2"), tmp_path)
    config = runs.config("llama", "fp32", "ZeRO-1", tmp_path)
    (message,) = run_ranks(with_one_step_less, 1, config, "configs/ds/zero1.json", init=False)
    assert "parameter 'head.norm.weight' has taken 3 optimizer steps, 'block_0." in message
    assert "resume at the ZeRO stage that wrote the checkpoint" in message


def test_a_batch_that_more_ranks_make_is_refused_with_remedies_that_work(runs, tmp_path):
    origin = runs.origin("llama", "fp32", "PP2 TP2")
    begin_at_checkpoint(origin, tmp_path)
    place = LAYOUTS["ZeRO-1 DP2"]
    twice = {"training__batch_size": 4}
    message = refusal(runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path, **twice), place)
    assert "was trained on 8 samples a step by 1 data ranks, and 2 would take 16: " in message
    assert "set training.gradient_accumulation_steps=1 to keep 8" in message
    ramp = f"[{{until_tokens: {SAVED * 8 * SEQ}, sequences_per_step: 8}}]"
    assert f"or training.batch_ramp={ramp} to go on with 16" in message
    kept = {**twice, "training__gradient_accumulation_steps": 1}
    config = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path, **kept)
    train(config, place)
    expected = [r["loss"] for r in origin.curve]
    assert [r["loss"] for r in tail(config)[0]] == pytest.approx(expected, rel=1e-5)
    grown = {**twice, "training__batch_ramp": yaml.safe_load(ramp)}
    begin_at_checkpoint(origin, tmp_path / "grown")
    config = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path / "grown", **grown)
    train(config, place)
    tokens = [r["tokens"] for r in tail(config)[0]]
    assert tokens == [SEQ * (SAVED * 8 + n * 16) for n in range(1, STEPS - SAVED + 1)]


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("training__precision", "bf16", "ZeRO-1"),
        ("training__optimizer", "muon", "ZeRO-0"),
        ("training__seed", 4, "ZeRO-1"),
    ],
)
def test_another_precision_optimizer_or_seed_is_refused(key, value, place, runs, tmp_path):
    begin_at_checkpoint(runs.origin("llama", "fp32", "PP2 TP2"), tmp_path)
    config = runs.config("llama", "fp32", place, tmp_path, **{key: value})
    message = refusal(config, LAYOUTS[place])
    assert f"is of another run ({key.replace('__', '.')}: " in message
    assert repr(value) in message


def test_what_only_deepspeed_can_restore_goes_on_at_its_layout_alone(runs, tmp_path):
    place = LAYOUTS["ZeRO-1 DP2"]
    json_file = tmp_path / "round_robin.json"
    json_file.write_text('{"zero_optimization": {"stage": 1, "round_robin_gradients": true}}')
    whole = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path / "whole")
    train(whole, place, ds_config_path=str(json_file))
    for name in ("same", "other"):
        begin_at_checkpoint(Origin(tmp_path / "whole", [], 0.0), tmp_path / name)
    same = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path / "same")
    train(same, place, ds_config_path=str(json_file))
    expected, found = tail(whole), tail(same)
    assert [r["loss"] for r in found[0]] == [r["loss"] for r in expected[0]]
    assert found[1] == expected[1]
    other = runs.config("llama", "fp32", "ZeRO-1", tmp_path / "other")
    message = refusal(other, LAYOUTS["ZeRO-1"])
    assert "is in DeepSpeed's own files, which fit only the layout that wrote them" in message
    assert "resume at the layout of the checkpoint" in message


def spoiled_master(config, ds_config_path: str) -> str:
    """`run`, in which a weight is changed behind the optimizer's back before it is saved."""
    save = Checkpointer.save

    def spoil_and_save(self, contents):
        next(iter(contents.weights)).load().data.view(-1)[0] += 1
        save(self, contents)

    Checkpointer.save = spoil_and_save
    return _refused(config, ds_config_path)


def test_weights_that_are_not_their_master_are_not_saved(runs, tmp_path):
    config = runs.config("llama", "bf16", "ZeRO-1", tmp_path)
    (message,) = run_ranks(spoiled_master, 1, config, "configs/ds/zero1.json", init=False)
    assert "step_4 was not saved, rank 0: parameter 'embedding.tokens.weight'" in message
    assert "the weights differ from their fp32 master" in message
    assert not list((tmp_path / "checkpoints").iterdir())


def on_a_full_disk(config, ds_config_path: str) -> str:
    """`run`, in which no file of the second data rank may grow beyond 20 kB."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return _refused(config, ds_config_path)


def test_a_full_disk_on_one_rank_is_told_by_all_and_publishes_nothing(runs, tmp_path):
    config = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path)
    messages = run_ranks(on_a_full_disk, 2, config, "configs/ds/zero1.json", init=False)
    assert messages[0] == messages[1]
    assert "step_4 was not saved, rank 1: OSError: [Errno 27] File too large" in messages[0]
    assert not list((tmp_path / "checkpoints").iterdir())
