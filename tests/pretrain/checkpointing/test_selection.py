"""Selection of the checkpoint to resume from: damage, links, names, other runs."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import Layout, TextRecord, read_manifest
from pretrain.checkpointing.selection import RunIdentity
from tests.pretrain.checkpointing.fixtures import (
    assert_holds,
    contents,
    flip_bit,
    identity,
    open_store,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=CheckpointError)


def test_the_newest_checkpoint_is_found_with_its_contents(run_dir: Path) -> None:
    assert_holds(open_store(run_dir).find("auto"), 10)
    assert_holds(open_store(run_dir).find("must"), 10)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_10\n"


def test_a_run_without_checkpoints_starts_from_its_beginning(tmp_path: Path) -> None:
    assert open_store(tmp_path / "run").find("auto") is None
    assert open_store(tmp_path / "run").find("never") is None
    with _refused(
        "resume", value="must", constraint="no checkpoint", remedy=("run_dir", "resume=auto")
    ):
        open_store(tmp_path / "run").find("must")


def test_resume_never_refuses_a_directory_that_holds_checkpoints(run_dir: Path) -> None:
    with _refused(
        "run_dir", value=run_dir, constraint="resume=never", remedy=("run_dir", "resume=auto")
    ):
        open_store(run_dir).find("never")


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer by one byte": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "one bit flipped": lambda path: flip_bit(path, path.stat().st_size // 2),
    "of an older step": lambda path: shutil.copy(str(path).replace("step_10", "step_9"), path),
}
FILES = (
    "engine/rank_0.pt",
    "weights/pp_00_tp_00.safetensors",
    "rng/rank_00000.safetensors",
    "trainer.json",
    "manifest.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_one_warning_that_names_the_file(
    run_dir: Path, caplog: pytest.LogCaptureFixture, damage: str, name: str
) -> None:
    DAMAGES[damage](run_dir / "checkpoints" / "step_10" / name)

    with caplog.at_level(logging.WARNING):
        assert_holds(open_store(run_dir).find("auto"), 9)

    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "checkpoint step_10 is not used" in message
    assert Path(name).name in message


def test_a_file_swapped_with_that_of_another_rank_is_found(run_dir: Path) -> None:
    directory = run_dir / "checkpoints" / "step_10"
    shutil.copy(directory / "trainer.json", directory / "engine" / "rank_0.pt")

    assert_holds(open_store(run_dir).find("auto"), 9)


@pytest.mark.parametrize("where", ["engine/rank_1.pt", "note.txt", ".hidden", "weights/x/y"])
def test_a_surplus_file_is_found(
    run_dir: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    path = run_dir / "checkpoints" / "step_10" / where
    path.parent.mkdir(exist_ok=True)
    path.write_text("")

    assert_holds(open_store(run_dir).find("auto"), 9)
    assert "does not belong to the checkpoint: move it away" in caplog.text


@pytest.mark.parametrize("name", [*FILES, "engine", "weights", ""])
def test_symbolic_links_are_refused_though_their_content_is_right(run_dir: Path, name: str) -> None:
    path = run_dir / "checkpoints" / "step_10" / name
    elsewhere = run_dir / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)

    assert_holds(open_store(run_dir).find("auto"), 9)


def test_only_damaged_checkpoints_are_an_error_and_no_fresh_start(run_dir: Path) -> None:
    for step in (9, 10):
        flip_bit(run_dir / "checkpoints" / f"step_{step}" / "engine" / "rank_0.pt", 0)

    for resume in ("auto", "must"):
        with pytest.raises(
            CheckpointError, match=r"no undamaged .*\(2 tried\).*rank_0.pt.*restore"
        ):
            open_store(run_dir).find(resume)


def test_a_checkpoint_directory_without_manifest_is_an_error_and_no_fresh_start(
    tmp_path: Path,
) -> None:
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    with assert_refused(
        "step_5",
        value="manifest.json",
        constraint="incomplete",
        remedy="run_dir",
        error=CheckpointError,
    ):
        open_store(tmp_path).find("auto")


BAD_LATEST = {
    "absent": None,
    "empty": b"",
    "blank": b" \n",
    "garbage": b"\x00\xff\xfe",
    "absent step": b"step_99\n",
    "older step": b"step_9\n",
    "outside": b"../../../etc\n",
    "absolute": b"/etc\n",
    "negative": b"step_-1",
    "long": b"step_1" * 10_000,
}


@pytest.mark.parametrize("kind", BAD_LATEST)
def test_latest_is_only_a_hint(run_dir: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    latest = run_dir / "checkpoints" / "latest"
    text = BAD_LATEST[kind]
    latest.unlink()
    if text is not None:
        latest.write_bytes(text)

    assert_holds(open_store(run_dir).find("auto"), 10)
    assert "the newest checkpoint is step_10" in caplog.text


def test_latest_that_is_a_directory_or_a_loop_does_no_harm(run_dir: Path) -> None:
    latest = run_dir / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to(latest)
    assert_holds(open_store(run_dir).find("auto"), 10)
    latest.unlink()
    latest.mkdir()
    assert_holds(open_store(run_dir).find("auto"), 10)


def test_latest_without_any_checkpoint_is_an_error_and_no_fresh_start(run_dir: Path) -> None:
    for step in (9, 10):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step}")
    with _refused(
        "latest", value="'step_10'", constraint="no such checkpoint", remedy=("restore", "delete")
    ):
        open_store(run_dir).find("auto")


@pytest.mark.parametrize("name", ["step_-1", "step_011", "step_", "step_1x", "xstep_12", "STEP_12"])
def test_directories_of_other_names_are_not_looked_at(run_dir: Path, name: str) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step_10", run_dir / "checkpoints" / name)
    assert_holds(open_store(run_dir).find("auto"), 10)


def test_a_checkpoint_renamed_to_another_step_is_refused(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step_10").rename(run_dir / "checkpoints" / "step_12")
    assert_holds(open_store(run_dir).find("auto"), 9)


def test_another_layout_is_an_error_that_names_both(run_dir: Path) -> None:
    other = identity(layout=Layout(tensor=2, zero_stage=1))
    with pytest.raises(CheckpointError) as caught:
        open_store(run_dir, run=other).find("auto")
    assert "written at tensor 1 x pipeline 1 x data 1, ZeRO-0, fp32" in str(caught.value)
    assert "this run is at tensor 2 x pipeline 1 x data 1, ZeRO-1, fp32" in str(caught.value)


def test_another_configuration_is_an_error_with_both_values(run_dir: Path) -> None:
    other = identity(config={"run_dir": "y", "training": {"lr": 0.2, "seed": 2}})
    with pytest.raises(
        CheckpointError, match=r"another run \(training.seed: 1 .*, 2 now\): choose"
    ):
        open_store(run_dir, run=other).find("auto")


def test_a_harmless_change_of_the_configuration_continues(run_dir: Path) -> None:
    other = identity(config={"run_dir": "y", "training": {"lr": 0.2, "seed": 1}})
    assert_holds(open_store(run_dir, run=other).find("auto"), 10)


def test_changed_data_is_an_error(run_dir: Path) -> None:
    with _refused(
        "step_10",
        value="'(fingerprint abc)'",
        constraint=("data", "'(fingerprint xyz)'"),
        remedy="run_dir",
    ):
        open_store(run_dir, run=identity(data="xyz")).find("auto")


def test_documents_that_end_or_begin_otherwise_are_an_error(tmp_path: Path) -> None:
    def run(**text: Any) -> RunIdentity:
        return identity()._replace(text=TextRecord(**text))

    store = open_store(tmp_path, run=run(eod_id=0, bos_ids=()))
    store.save(contents(1))
    store.close()
    manifest = read_manifest(tmp_path / "checkpoints" / "step_1")
    assert manifest.text == TextRecord(eod_id=0, bos_ids=())
    # What is not known, as in a checkpoint of an earlier version, is not compared.
    for same in ({}, {"eod_id": 0}, {"eod_id": 0, "bos_ids": (), "special_tokens": "parse"}):
        assert open_store(tmp_path, run=run(**same)).find("auto") is not None
    with _refused("step_1", value=0, constraint="5", remedy="training.init_from"):
        open_store(tmp_path, run=run(eod_id=5)).find("auto")
    with _refused("step_1", value="no token", constraint="(1,)", remedy="training.init_from"):
        open_store(tmp_path, run=run(bos_ids=(1,))).find("auto")


def test_a_directory_without_a_checkpoint_is_reserved_by_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    for text in (yaml.safe_dump({"run_dir": "x", "training": {"seed": 3}}), "a: ["):
        config.write_text(text)
        store = open_store(tmp_path)
        assert store.find("auto") is None
        store.close()
