"""Files of a run are closed to other users, whatever umask it was started with."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from models.convert import _published
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.lock import LOCK_NAME
from pretrain.config import RunConfig, to_yaml
from pretrain.train import main
from tests.distributed import run_ranks
from tests.pretrain.checkpointing.fixtures import open_store
from tests.pretrain.tiny_run import tiny_run, write_data
from tests.refusals import assert_refused

UMASKS = (0o000, 0o022, 0o077)
LAYOUTS = {
    # Everything that writes: our checkpoints, TensorBoard, W&B and what it starts.
    "all writers": {
        "logging__tensorboard": True,
        "logging__wandb": {"mode": "offline", "project": "p"},
    },
    # DeepSpeed writes its own files here, and copies scripts that its manual says to run.
    "files of DeepSpeed": {"training__optimizer": "muon", "training__precision": "bf16"},
}


def _train(directory: Path, config: RunConfig, umask: int) -> int:
    (directory / "private.yaml").write_text(to_yaml(config))
    os.umask(umask)
    code = main(["--config-name", "private", "--config-dir", str(directory)])
    assert os.umask(umask) == umask, "the umask of the caller is as it was"
    return code


def _modes(folder: Path) -> dict[str, int]:
    paths = [folder, *folder.rglob("*")]
    return {
        str(path): stat.S_IMODE(path.lstat().st_mode) for path in paths if not path.is_symlink()
    }


@pytest.mark.parametrize(
    ("umask", "layout"),
    [*((umask, "all writers") for umask in UMASKS), (0o000, "files of DeepSpeed")],
)
def test_a_run_directory_is_for_its_user_and_group_alone(
    tmp_path: Path, umask: int, layout: str
) -> None:
    write_data(tmp_path)
    config = tiny_run(tmp_path, training__max_steps=2, **LAYOUTS[layout])
    assert run_ranks(_train, 1, tmp_path, config, umask, init=False) == [0]
    modes = _modes(Path(config.run_dir))
    folder, file = (0o700, 0o600) if umask == 0o077 else (0o750, 0o640)
    wrong = {
        path: oct(mode)
        for path, mode in modes.items()
        if mode != (folder, file)[Path(path).is_file()]
    }
    print(f"umask {umask:03o}, {layout}: {len(modes)} paths, {len(wrong)} of another mode")
    assert wrong == {}
    assert [path for path in modes if path.endswith(".py")] == []
    names = {Path(path).name for path in modes}
    assert {LOCK_NAME, "config.yaml", "metrics.jsonl", "manifest.json", "latest"} <= names
    expected = {"tensorboard", "wandb"} if layout == "all writers" else {"engine"}
    assert expected <= names


@pytest.mark.parametrize("place", ["", "checkpoints", LOCK_NAME])
def test_a_run_directory_that_everybody_can_write_is_refused(tmp_path: Path, place: str) -> None:
    """Also where the sticky bit keeps them from deleting: planting is enough."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    path = run_dir / place
    path.touch() if place == LOCK_NAME else path.mkdir(exist_ok=True)
    path.chmod(0o1777)
    with assert_refused(
        str(path),
        value="user",
        constraint="checkpoint",
        remedy=("chmod o-w", "run_dir"),
        error=CheckpointError,
    ):
        open_store(run_dir)
    path.chmod(0o750)
    open_store(run_dir).close()
    assert stat.S_IMODE((run_dir / LOCK_NAME).stat().st_mode) & stat.S_IRWXO == 0


@pytest.mark.parametrize("umask", UMASKS)
def test_a_converted_model_is_as_open_as_its_user_wants(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with _published(tmp_path / "model") as folder:
            (folder / "weights").mkdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask
