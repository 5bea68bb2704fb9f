"""Reports and refusals of a resumed run, and the files of a failed start and a finished run."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.sampling.curriculum import Position
from parallel.checkpoint.errors import CheckpointError
from pretrain.checkpointing.train_state import position_of
from tests.data_tools.corpora import write_corpus
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import SEQ, metrics, tiny_run
from tests.refusals import assert_refused


def _said(config, ds_config_path: str | None = None) -> tuple[str, list[str]]:
    """The error that ends a run, or nothing, and every line that it says."""
    text, error = io.StringIO(), ""
    logging.getLogger().addHandler(logging.StreamHandler(text))
    with contextlib.redirect_stdout(text):
        try:
            run_training(config, ds_config_path)
        except ValueError as refusal:
            error = str(refusal)
    return error, text.getvalue().splitlines()


def _run(data: Path, run_dir: Path, **changes: Any) -> tuple[str, list[str]]:
    """The output of rank 0 of one process; other numbers of ranks: `world_size`."""
    world_size = changes.pop("world_size", 1)
    config = tiny_run(data, run_dir=str(run_dir), **changes)
    return run_ranks(_said, world_size, config, "configs/ds/zero1.json", init=False)[0]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The directory of a run of 4 steps, to be copied."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    error, _ = _run(data, run_dir)
    assert error == ""
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _changed(lines: list[str]) -> list[str]:
    return [line for line in lines if " -> " in line]


def test_every_change_is_said_in_a_line_with_the_rates_before_and_after(data, run_dir):
    error, lines = _run(
        data,
        run_dir,
        training__max_steps=8,
        training__lr=2e-2,
        training__z_loss=1e-4,
        checkpoint__interval=4,
        training__init_from="elsewhere",
    )
    assert error == ""
    assert _changed(lines) == [
        "checkpoint.interval: 2 -> 4",
        "training.init_from: none -> 'elsewhere', which has no effect: the weights are the "
        "checkpoint's",
        "training.lr: 0.01 -> 0.02",
        "training.max_steps: 4 -> 8",
        "training.z_loss: 0.0 -> 0.0001",
        "learning rate: 0.001 in step 4 -> 0.009 in step 5",
    ]
    rates = {
        record["step"]: record["lr"] for record in metrics(tiny_run(data, run_dir=str(run_dir)))[0]
    }
    assert rates[4] == pytest.approx(0.001)
    assert rates[5] == pytest.approx(0.009, abs=5e-6)


def test_another_layout_and_batch_are_said_too(data, run_dir):
    changes = {"training__max_steps": 6, "training__batch_size": 6, "parallel__pipeline": 2}
    error, lines = _run(data, run_dir, world_size=4, **changes)
    assert error == ""
    assert _changed(lines) == [
        "parallel.pipeline: 1 -> 2",
        "training.batch_size: 4 -> 6",
        "training.max_steps: 4 -> 6",
        "data ranks: 1 -> 2",
        "sequences per step: 8 in step 4 -> 24 in step 5",
        "learning rate: 0.001 in step 4 -> 0.00186 in step 5",
    ]


def test_a_run_that_goes_on_as_it_was_says_nothing_of_changes(data, tmp_path):
    _run(data, tmp_path / "run", training__max_steps=2)
    _run(data, tmp_path / "run", training__max_steps=4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_2\n")
    config = {"training__max_steps": 4}
    _, lines = _run(data, tmp_path / "run", **config)
    assert "continuing after step 2" in " ".join(lines)
    assert _changed(lines) == [
        "training.max_steps: 2 -> 4",
        "learning rate: 0.001 in step 2 -> 0.00325 in step 3",
    ]
    _run(data, tmp_path / "run", training__max_steps=6)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    _, lines = _run(data, tmp_path / "run", training__max_steps=4)
    assert _changed(lines) == []


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"training__max_steps": 3}, "with training.max_steps=3 the run ends after 3 steps, and"),
        (
            {"training__max_steps": None, "training__max_tokens": 3 * 8 * SEQ},
            f"with training.max_tokens={3 * 8 * SEQ} the run ends after 3 steps, and",
        ),
    ],
)
def test_an_end_before_the_checkpoint_is_an_error_that_changes_nothing(
    limit, message, data, run_dir
):
    others = ("run.lock", "DONE")
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name not in others}
    error, _ = _run(data, run_dir, **limit)
    assert message in error
    assert f"the checkpoint in {str(run_dir)!r} has taken 4: train longer, or choose" in error
    assert {p: p.read_bytes() for p in before} == before
    assert not (run_dir / "DONE").exists(), "a launcher would read that the run has ended"


def test_a_finished_run_says_so_and_writes_nothing_but_its_marker(data, run_dir):
    (run_dir / "DONE").unlink()
    config = run_dir / "config.yaml"
    before = config.read_bytes()
    error, lines = _run(data, run_dir, checkpoint__interval=3, training__batch_size=2)
    assert error == ""
    assert lines == [
        "checkpoint.interval: 2 -> 3",
        "training.batch_size: 4 -> 2",
        f"{run_dir} is complete at step 4: there is nothing left to train",
    ]
    assert config.read_bytes() == before
    assert (run_dir / "DONE").exists()


def test_a_start_that_fails_reserves_nothing_for_its_settings(data, tmp_path):
    run_dir = tmp_path / "run"
    error, _ = _run(data, run_dir, training__init_from=str(tmp_path / "nowhere"))
    assert f"training.init_from: no weights in {str(tmp_path / 'nowhere')!r}" in error
    assert not (run_dir / "config.yaml").exists()
    error, _ = _run(data, run_dir, model__hidden_size=64, training__seed=5)
    assert error == ""
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["hidden_size"] == 64


def _tokenizer(folder: Path, text: str = "{}") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(text)
    return str(folder / "tokenizer.json")


def test_files_that_moved_are_the_same_and_others_in_their_place_are_not(data, tmp_path):
    """Sources and a tokenizer below another folder; then another tokenizer there."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [list(range(60))] * 30
    for name in ("train", "validation"):
        write_corpus(corpus / name, rows, vocab_size=61)
    for sidecar in corpus.glob("*.json"):
        sidecar.unlink()  # which would name the tokenizer

    def settings(folder: Path, **changes: Any) -> dict[str, Any]:
        paths = {f"data__{split}": str(folder / split) for split in ("train", "validation")}
        return {**paths, "data__tokenizer": _tokenizer(folder), **changes}

    run_dir = tmp_path / "run"
    assert _run(data, run_dir, **settings(corpus))[0] == ""
    moved = corpus.rename(tmp_path / "moved")
    error, lines = _run(data, run_dir, **settings(moved, training__max_steps=6))
    assert error == ""
    assert _changed(lines)[0] == "training.max_steps: 4 -> 6"
    changes = settings(moved, training__max_steps=8)
    _tokenizer(moved, '{"another": 1}')
    error, _ = _run(data, run_dir, **changes)
    assert "is of another run (data.tokenizer: " in error
    _tokenizer(moved)
    for suffix in (".bin", ".idx"):
        (moved / f"train{suffix}").rename(moved / f"renamed{suffix}")
    error, _ = _run(data, run_dir, **{**changes, "data__train": str(moved / "renamed")})
    assert "data source renamed is the corpus that the checkpoint was trained on as train" in error
    source = {"path": str(moved / "renamed"), "name": "train"}
    assert _run(data, run_dir, **{**changes, "data__train": [source]})[0] == ""


def test_held_out_text_that_is_another_is_said(data, run_dir, tmp_path):
    write_corpus(tmp_path / "validation", [list(range(50))] * 9, vocab_size=61)
    validation = {"data__validation": str(tmp_path / "validation"), "training__max_steps": 6}
    error, lines = _run(data, run_dir, **validation)
    assert error == ""
    (line,) = (line for line in _changed(lines) if "validation" in line)
    assert line.startswith("data.validation.validation.path: ")
    assert line.count("(fingerprint ") == 2


@pytest.mark.parametrize(
    "trainer",
    [
        {"tokens": -1}, {"tokens": "9"}, {"tokens": None}, {"tokens": 1.5}, {"tokens": 15},
        {"step": None}, {"step": "2"},
    ],
)  # fmt: skip
def test_a_position_that_no_run_has_is_refused(trainer):
    state = {
        "version": 2, "consumed_samples": 16, "seed": 1, "sequence_length": 8, "sources": {},
        "mix": {"weights": {}, "sequence_length": 8, "start_sample": 0, "base": {}, "given": {}},
    }  # fmt: skip
    good = {"step": 2, "tokens": 128, "data": state}
    assert position_of(good) == Position(2, 16, 128)
    with assert_refused(
        "step", value="tokens", constraint="samples", remedy="checkpoint", error=CheckpointError
    ):
        position_of({**good, **trainer})
