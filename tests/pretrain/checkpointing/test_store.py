from __future__ import annotations

import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import Layout, TextRecord, read_manifest
from pretrain.checkpoint import main
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


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 9 and 10."""
    store = open_store(tmp_path / "run")
    store.save(contents(9))
    torch.rand(1)  # the two checkpoints hold different generator states
    store.save(contents(10))
    store.close()
    return tmp_path / "run"


def entries(run_dir: Path) -> list[str]:
    return sorted(entry.name for entry in (run_dir / "checkpoints").iterdir())


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_the_newest_checkpoint_is_found_with_its_contents(run_dir: Path) -> None:
    assert_holds(open_store(run_dir).find("auto"), 10)
    assert_holds(open_store(run_dir).find("must"), 10)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_10\n"


def test_manifest_describes_every_file_and_how_the_weights_are_cut(run_dir: Path) -> None:
    directory = run_dir / "checkpoints" / "step_10"
    manifest = read_manifest(directory)

    names = {p.relative_to(directory).as_posix() for p in files_of(directory)}
    assert set(manifest.files) | {"manifest.json"} == names
    assert manifest.sharding == {"w": (0, 2)}
    assert manifest.config == identity().config
    assert manifest.fingerprints == {"data": "abc"}
    assert {"python", "torch", "deepspeed"} <= set(manifest.versions)


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


def test_saving_over_a_damaged_checkpoint_sets_it_aside(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip_bit(run_dir / "checkpoints" / "step_10" / "manifest.json", 100)
    store = open_store(run_dir)
    assert_holds(store.find("auto"), 9)
    store.save(contents(10))
    store.close()

    assert_holds(open_store(run_dir).find("must"), 10)
    assert [name[:15] for name in entries(run_dir)] == [
        "damaged-step_10",
        "latest",
        "step_10",
        "step_9",
    ]
    assert "moving the unusable step_10" in caplog.text


def test_saving_the_same_step_twice_leaves_the_first_in_place(run_dir: Path) -> None:
    store = open_store(run_dir)
    store.find("auto")
    before = (run_dir / "checkpoints" / "step_10").stat().st_ino

    store.save(contents(10))

    assert (run_dir / "checkpoints" / "step_10").stat().st_ino == before


def test_trainer_state_that_is_not_json_publishes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(CheckpointError, match=r"step_3 .*, rank 0: .*JSON"):
        store.save(contents(3)._replace(trainer={"loss": object()}))
    assert entries(tmp_path) == []


def test_a_second_job_in_the_same_directory_is_refused(run_dir: Path) -> None:
    store = open_store(run_dir)
    pid = os.fork()
    if pid == 0:
        try:
            open_store(run_dir)
        except CheckpointError as error:
            owner = f"is in use by process {os.getppid()} on "
            os._exit(0 if owner in str(error) and "choose another run_dir" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    store.close()
    open_store(run_dir).close()


def test_a_job_that_lost_its_lock_publishes_nothing(run_dir: Path) -> None:
    store = open_store(run_dir)
    (run_dir / "run.lock").unlink()
    with pytest.raises(CheckpointError, match=r"step_11 .*run_dir"):
        store.save(contents(11))
    assert entries(run_dir) == ["latest", "step_10", "step_9"]


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with _refused("run_dir", value=tmp_path / "file", constraint="File exists", remedy="writable"):
        open_store(tmp_path / "file")


def test_left_overs_of_an_interrupted_save_are_removed_with_one_line(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (".tmp-step_11-0a1b2c3d", ".delete-step_8-0a1b2c3d"):
        (run_dir / "checkpoints" / name / "engine").mkdir(parents=True)
    (run_dir / "checkpoints" / ".latest-0a1b2c3d").write_text("ste")

    store = open_store(run_dir)

    assert entries(run_dir) == ["latest", "step_10", "step_9"]
    assert caplog.text.count("left by an interrupted save") == 3
    assert_holds(store.find("auto"), 10)


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


def test_every_single_bit_flip_of_a_checkpoint_is_found(run_dir: Path) -> None:
    """Every byte of the manifest, every 29th of the others."""
    directory = run_dir / "checkpoints" / "step_10"
    trials = 0
    for path in files_of(directory):
        original = path.read_bytes()
        for position in range(0, len(original), 1 if path.name == "manifest.json" else 29):
            flip_bit(path, position)
            assert main(["verify", str(directory)]) == 3, (path, position)
            path.write_bytes(original)
            trials += 1
    assert trials > 1500
    assert main(["verify", str(directory)]) == 0


def test_command_line_lists_and_verifies(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run_dir)]) == 0
    assert main(["verify", str(run_dir / "checkpoints")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step_9", "step_10"] * 2
    assert "complete, 4 files" in lines[0]
    assert "verified, 4 files" in lines[2]

    directory = run_dir / "checkpoints" / "step_9"
    weights = next(path for path in files_of(directory) if path.suffix == ".safetensors")
    flip_bit(weights, 0)
    assert main(["list", str(run_dir)]) == 0  # sizes only
    assert main(["verify", str(run_dir)]) == 3
    assert "step_9: DAMAGED" in capsys.readouterr().out
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert main(["list", str(run_dir)]) == 3
    assert f"has {len(content) - 1} bytes, expected {len(content)}" in capsys.readouterr().out
    weights.write_bytes(content)
    flip_bit(directory / "trainer.json", 0)
    assert main(["list", str(run_dir)]) == 3  # it shows the ledger
    assert main(["list", str(run_dir / "nothing")]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_manifest_of_a_later_format_says_so(run_dir: Path) -> None:
    directory = run_dir / "checkpoints" / "step_10"
    manifest = read_manifest(directory)
    later = manifest.model_copy(update={"format_version": 2})
    (directory / "manifest.json").write_bytes(later.to_bytes())

    with _refused("manifest.json", value=2, constraint="reads 1", remedy="version"):
        read_manifest(directory)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "a\nb", "a/b/c/d/e", "-x", "a" * 200],
)
def test_a_manifest_that_names_a_file_outside_is_refused(run_dir: Path, name: str) -> None:
    directory = run_dir / "checkpoints" / "step_10"
    manifest = read_manifest(directory)
    files = {name: manifest.files["trainer.json"]}
    (directory / "manifest.json").write_bytes(
        manifest.model_copy(update={"files": files}).to_bytes()
    )

    with _refused("manifest.json", value=repr(name), constraint="files", remedy="copy"):
        read_manifest(directory)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"null", b"{" * 5000, b'{"files": 1}', b"\xff"])
def test_a_manifest_that_is_something_else_is_refused(run_dir: Path, raw: bytes) -> None:
    directory = run_dir / "checkpoints" / "step_10"
    (directory / "manifest.json").write_bytes(raw)
    with _refused("manifest.json", value="damaged", constraint=(), remedy="copy"):
        read_manifest(directory)


def test_manifest_keeps_its_values_through_the_file(run_dir: Path) -> None:
    manifest = read_manifest(run_dir / "checkpoints" / "step_10")
    assert json.loads(manifest.to_bytes())["sharding"] == {"w": [0, 2]}
    assert (
        manifest.to_bytes() == (run_dir / "checkpoints" / "step_10" / "manifest.json").read_bytes()
    )
