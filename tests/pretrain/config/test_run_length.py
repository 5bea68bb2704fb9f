"""Number of steps of a run, with and without its data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.sampling.curriculum import Position
from parallel.context import ParallelContext
from pretrain.config import RunConfig, parse_config
from pretrain.config.layout import check_layout
from pretrain.config.run_length import plan_run
from pretrain.errors import ConfigError
from pretrain.run_data import open_training_data
from tests.data_tools.corpora import write_corpus
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused

EPOCHS = {"training__max_steps": None, "training__max_epochs": 1}


def _run(**changes: Any) -> RunConfig:
    return parse_config(run_values(**changes))


def test_counts_of_a_step_follow_from_the_layout() -> None:
    config = _run(parallel__pipeline=2, training__gradient_accumulation_steps=3)
    curriculum = plan_run(config, data_size=4)
    assert curriculum.stage_after(0).sequences_per_step == 2 * 3 * 4
    assert curriculum.tokens_after(1) == 2 * 3 * 4 * 128
    assert curriculum.total_steps == 10


@pytest.mark.parametrize(
    ("max_tokens", "max_steps", "steps"),
    [(256 * 7, None, 7), (256 * 7 + 1, None, 8), (256 * 7, 5, 5), (256 * 7, 9, 7)],
)
def test_training_ends_at_the_first_of_its_two_limits(
    max_tokens: int, max_steps: int | None, steps: int
) -> None:
    config = _run(training__max_tokens=max_tokens, training__max_steps=max_steps)
    assert plan_run(config, data_size=1).total_steps == steps


@pytest.mark.parametrize("max_tokens", [None, 256 * 5])
@pytest.mark.parametrize("num_tokens", [256 * 4, 256 * 4 + 1, 256 * 40])
def test_epochs_are_a_limit_on_tokens_like_max_tokens(
    max_tokens: int | None, num_tokens: int
) -> None:
    config = _run(**EPOCHS, training__max_tokens=max_tokens)
    limit = min(num_tokens, max_tokens or num_tokens)
    expected = _run(training__max_steps=None, training__max_tokens=limit)
    found = plan_run(config, data_size=1, num_tokens=num_tokens)
    assert found.total_steps == plan_run(expected, data_size=1).total_steps


def test_a_warmup_longer_than_the_epochs_allow_is_refused() -> None:
    config = _run(**EPOCHS, training__warmup_steps=7)
    constraint = ("training.warmup_steps", "7")
    with assert_refused("run", 7, constraint, "longer", error=ConfigError):
        plan_run(config, data_size=1, num_tokens=256 * 7)
    assert plan_run(config, data_size=1, num_tokens=256 * 8).total_steps == 8
    # A run that continues may have changed its length: it is already past its warmup.
    start = Position(steps=6, samples=12, tokens=256 * 6)
    assert plan_run(config, data_size=1, num_tokens=256 * 7, start=start).total_steps == 7


def test_a_ramp_is_checked_without_the_data() -> None:
    ramp = [{"until_tokens": 100, "sequences_per_step": 3}]
    config = _run(**EPOCHS, training__gradient_accumulation_steps=4, training__batch_ramp=ramp)
    with assert_refused(
        "training.batch_ramp.0.sequences_per_step",
        value=3,
        constraint="2",
        remedy="2, 4",
        error=ConfigError,
    ):
        check_layout(config, 1)


@pytest.mark.parametrize(
    ("epochs", "max_tokens", "steps"), [(1, None, 8), (0.5, None, 4), (3, 256 * 5, 5)]
)
def test_training_ends_after_epochs_of_all_sources_together(
    epochs: float, max_tokens: int | None, steps: int, tmp_path: Path
) -> None:
    for name, length in (("a", 1000), ("b", 800)):
        write_corpus(tmp_path / name, [np.arange(length)], vocab_size=4096)
    sources = [
        {"path": str(tmp_path / name), "weight": weight} for name, weight in (("a", 1), ("b", 9))
    ]
    changes = {"training__max_steps": None, "training__max_tokens": max_tokens}
    config = _run(data__train=sources, training__max_epochs=epochs, **changes)
    with open_training_data(config, ParallelContext.single().data) as loader:
        assert loader.curriculum.total_steps == steps  # of 2 x 128 tokens


def test_settings_with_epochs_are_resolved_without_torch_and_without_the_data(
    tmp_path: Path,
) -> None:
    """Counting tokens would import torch and open the corpus, on every rank and twice."""
    data = tmp_path / "data"
    data.mkdir()
    write_corpus(data / "train", [np.arange(1000)], vocab_size=4096)
    run = run_values(data__train=str(data / "train"), data__validation=[])
    (tmp_path / "mine.yaml").write_text(json.dumps(run))
    code = f"""
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from pretrain.config.compose import compose_config
from pretrain.config.resolve import resolve_run
overrides = ["training.max_epochs=2", "training.max_steps=null"]
config = compose_config("mine", config_dir={str(tmp_path)!r}, overrides=overrides)
assert config.training.max_epochs == 2 and config.data.train[0].path.startswith({str(data)!r})
assert resolve_run(config, None, world_size=4).layout.data == 4
assert any("mine.yaml" in path for path in opened), "the audit hook sees what is opened"
assert not [path for path in opened if path.startswith({str(data)!r})]
assert not {{"torch", "deepspeed", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
