"""Saving, publishing and verifying checkpoints, and the lock of a run directory."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import read_manifest
from pretrain.checkpoint import main
from tests.pretrain.checkpointing.fixtures import (
    assert_holds,
    contents,
    flip_bit,
    identity,
    open_store,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=CheckpointError)


def entries(run_dir: Path) -> list[str]:
    return sorted(entry.name for entry in (run_dir / "checkpoints").iterdir())


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_manifest_describes_every_file_and_how_the_weights_are_cut(run_dir: Path) -> None:
    directory = run_dir / "checkpoints" / "step_10"
    manifest = read_manifest(directory)

    names = {p.relative_to(directory).as_posix() for p in files_of(directory)}
    assert set(manifest.files) | {"manifest.json"} == names
    assert manifest.sharding == {"w": (0, 2)}
    assert manifest.config == identity().config
    assert manifest.fingerprints == {"data": "abc"}
    assert {"python", "torch", "deepspeed"} <= set(manifest.versions)


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
    assert "complete, 5 files" in lines[0]
    assert "verified, 5 files" in lines[2]

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
