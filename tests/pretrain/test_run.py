"""A run before its loop: data opened once, and one-line errors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading import builders
from pretrain import loop
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.errors import EXIT_COMPLETED
from pretrain.loop import TrainLoop
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run

EPOCHS = {"training__max_steps": None, "training__max_epochs": 0.25, "training__batch_size": 2}


def _opened(config, ds_config_path: str) -> Counter[str]:
    """Run; how often each rank has opened the sources of each split."""
    opened: Counter[str] = Counter()
    original = builders.open_sources

    def counted(data, sources, **kwargs: Any):
        opened["train" if sources == data.train else "validation"] += 1
        return original(data, sources, **kwargs)

    builders.open_sources = counted
    assert run_training(config, ds_config_path) == EXIT_COMPLETED
    return opened


def test_a_run_of_epochs_opens_its_data_once(data: Path, tmp_path: Path) -> None:
    config = tiny_run(data, run_dir=str(tmp_path / "run"), **EPOCHS)
    opened = run_ranks(_opened, 2, config, "configs/ds/zero1.json", init=False)
    assert opened == [{"train": 1, "validation": 1}] * 2
    assert metrics(config)[0], "the epochs are some steps"


def _refused(config, ds_config_path: str) -> tuple[str, str]:
    with pytest.raises(ValueError) as refusal:
        run_training(config, ds_config_path)
    return type(refusal.value).__name__, str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": "nowhere/train"}, "data.train: nowhere/train.idx: no such file"),
        (
            {"training__warmup_steps": 50},
            "steps, not more than training.warmup_steps + training.decay_steps = 50; shorten",
        ),
    ],
)
def test_epochs_that_cannot_be_planned_are_one_line_on_all_ranks_before_training(
    changes: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    config = tiny_run(data, run_dir=str(tmp_path / "run"), **EPOCHS, **changes)
    first, second = run_ranks(_refused, 2, config, "configs/ds/zero1.json", init=False)
    assert first == second
    kind, text = first
    assert kind == "AgreedError"
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [1, 2, 3]), (1000.0, [3]), (None, [3])])
def test_a_run_saves_by_the_time_of_its_first_rank(minutes, saved, data: Path, tmp_path: Path):
    config = tiny_run(
        data,
        run_dir=str(tmp_path / "run"),
        training__max_steps=3,
        checkpoint__interval=1000,
        checkpoint__interval_minutes=minutes,
        checkpoint__keep=5,
        parallel__tensor=2,
    )
    codes = run_ranks(run_training, 2, config, "configs/ds/zero1.json", init=False)
    assert codes == [EXIT_COMPLETED] * 2
    folders = (Path(config.run_dir) / "checkpoints").glob("step_*")
    assert sorted(int(folder.name.removeprefix("step_")) for folder in folders) == saved


def _with_slow_saves(config, ds_config_path: str) -> int:
    """Run by a clock of which a step takes 30 minutes and a save 100."""
    minutes = 0.0

    def taking(duration: float, action):
        def timed(*args: Any, **kwargs: Any):
            nonlocal minutes
            minutes += duration
            return action(*args, **kwargs)

        return timed

    loop.time = SimpleNamespace(monotonic=lambda: 60 * minutes)
    TrainLoop._train = taking(30, TrainLoop._train)
    Checkpointer.save = taking(100, Checkpointer.save)
    return run_training(config, ds_config_path)


def test_a_save_longer_than_the_interval_is_not_followed_by_the_next_one(data, tmp_path):
    config = tiny_run(
        data,
        run_dir=str(tmp_path / "run"),
        training__max_steps=6,
        checkpoint__interval=1000,
        checkpoint__interval_minutes=50,
        checkpoint__keep=6,
    )
    run_ranks(_with_slow_saves, 1, config, "configs/ds/zero1.json", init=False)
    folders = (Path(config.run_dir) / "checkpoints").glob("step_*")
    assert {folder.name for folder in folders} == {"step_2", "step_4", "step_6"}
