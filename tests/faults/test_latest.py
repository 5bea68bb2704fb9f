"""Whatever has become of `latest`: the right checkpoint or an error, never a silent fresh start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.checkpoint.errors import CheckpointError
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, open_store
from tests.refusals import assert_refused

NEWEST = 2


def torn(latest: Path) -> None:
    """A later checkpoint without a manifest, and `latest` names it."""
    shutil.copytree(latest.parent / f"step_{NEWEST}", latest.parent / "step_3")
    (latest.parent / "step_3" / "manifest.json").unlink()
    latest.write_text("step_3\n")


def replaced_by_a_folder(latest: Path) -> None:
    latest.unlink()
    latest.mkdir()


def replaced_by_a_loop(latest: Path) -> None:
    latest.unlink()
    latest.symlink_to(latest.name)


CASES: dict[str, Callable[[Path], object]] = {
    "missing": lambda latest: latest.unlink(),
    "empty": lambda latest: latest.write_text(""),
    "white space": lambda latest: latest.write_text(" \n\t\n"),
    "garbage": lambda latest: latest.write_text("}{ not a name"),
    "a checkpoint that is not there": lambda latest: latest.write_text("step_99\n"),
    "an older checkpoint": lambda latest: latest.write_text("step_1\n"),
    "a torn checkpoint": torn,
    "a path outside": lambda latest: latest.write_text("../..\n"),
    "not UTF-8": lambda latest: latest.write_bytes(b"step_\xff\xfe\n"),
    "CRLF": lambda latest: latest.write_bytes(f"step_{NEWEST}\r\n".encode()),
    "a folder": replaced_by_a_folder,
    "a loop": replaced_by_a_loop,
}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    store = open_store(tmp_path / "begun")
    for step in range(1, NEWEST + 1):
        store.save(contents(step))
    store.close()
    return tmp_path / "begun"


def test_latest_decides_nothing(begun: Path, tmp_path: Path) -> None:
    right = refused = 0
    for number, (name, damage) in enumerate(CASES.items()):
        run_dir = tmp_path / str(number)
        shutil.copytree(begun, run_dir)
        damage(run_dir / "checkpoints" / "latest")
        store = open_store(run_dir)
        assert_holds(store.find("auto"), NEWEST)
        right += 1
        store.close()
        for path in (run_dir / "checkpoints").glob("step_*"):
            shutil.rmtree(path)
        if name == "missing":  # and no checkpoint: the run has not begun
            continue
        store = open_store(run_dir)
        with assert_refused(
            "latest",
            value="names",
            constraint="checkpoint",
            remedy=("restore", "delete"),
            error=CheckpointError,
        ):
            store.find("auto")
        refused += 1
        store.close()
    print(
        f"\nlatest: {right} of {len(CASES)} the right checkpoint; without any, {refused} of "
        f"{len(CASES) - 1} an error, 0 silent fresh starts: {', '.join(CASES)}"
    )
