"""The oracle's reader returns what the loader returns, sample by sample, whatever the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.config import DataConfig
from parallel.context import ParallelContext
from pretrain.config import RunConfig, parse_config
from pretrain.prove.corpus import make_corpus
from pretrain.prove.truth.oracle import planned_steps
from pretrain.prove.truth.reader import held_out_rows, interleaved, permuted, samples_of_steps
from pretrain.run_data import open_held_out_data, open_training_data
from tests.pretrain.run_values import run_values

DATA = {
    "tokens": {},
    "documents": {"reset_at_documents": True},
    "mix": {
        "train": [
            {"name": "a", "path": "a", "weight": 7.0},
            {"name": "b", "path": "b", "weight": 2.0},
            {"name": "c", "path": "c", "weight": 1.0},
        ],
        "reset_at_documents": True,
    },
    "stages": {
        "train": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}],
        "stages": [
            {"until_step": 2, "sequence_length": 8, "weights": {"a": 1.0}},
            {"until_step": 3, "sequence_length": 16, "weights": {"a": 1.0, "b": 3.0}},
            {"weights": {"b": 1.0}},
        ],
    },
    "bytes": {"kind": "bytes", "reset_at_documents": True},
    "blank lines": {"kind": "bytes", "documents": "blank_line", "reset_at_documents": True},
    "jsonl": {
        "kind": "bytes",
        "documents": "jsonl",
        "json_key": "body",
        "reset_at_documents": True,
    },
}
RAMP = [
    {"until_tokens": 100, "sequences_per_step": 2},
    {"until_tokens": 300, "sequences_per_step": 4},
]


def made_run(folder: Path, data: dict, **training) -> RunConfig:
    values = run_values(**{f"data__{name}": value for name, value in data.items()})
    values["model"]["vocab_size"] = 300
    values["data"]["sequence_length"] = 32
    values["training"] |= {"max_steps": 6, "gradient_accumulation_steps": 3, **training}
    values["evaluation"] = {"max_windows": 5}
    if data.get("documents") == "jsonl":
        values["data"]["cache_dir"] = str(folder / "cache")
    config = parse_config(values)
    made = make_corpus(config.data, folder / "data", vocab_size=300, num_tokens=400)
    return config.model_copy(update={"data": made})


@pytest.mark.parametrize("training", [{}, {"batch_ramp": RAMP}], ids=["constant", "ramp"])
@pytest.mark.parametrize("data", DATA)
def test_the_reader_returns_the_samples_of_the_loader(data, training, tmp_path):
    config = made_run(tmp_path, DATA[data], **training)
    plan = planned_steps(config, batches={1: 3 * config.training.batch_size})
    rows = samples_of_steps(config.data, plan, seed=config.training.seed)
    with open_training_data(config, ParallelContext.single().data) as loader:
        for step, expected in zip(plan, rows, strict=True):
            batches = [next(loader) for _ in range(step.sequences // config.training.batch_size)]
            for name, found in (("tokens", "tokens"), ("labels", "labels")):
                ours = np.stack([getattr(row, name) for row in expected])
                theirs = np.concatenate([getattr(batch, found).numpy() for batch in batches])
                assert np.array_equal(ours, theirs), (data, name)
            if config.data.reset_at_documents:
                ours = np.stack([row.segments for row in expected])
                theirs = np.concatenate([batch.segment_ids.numpy() for batch in batches])
                assert np.array_equal(ours, theirs), data


def test_the_reader_crosses_the_end_of_an_epoch(tmp_path):
    config = made_run(tmp_path, {})
    steps = planned_steps(config, batches={1: 3 * config.training.batch_size})
    windows = 400 // config.data.sequence_length
    assert sum(step.sequences for step in steps) > windows


@pytest.mark.parametrize("data", ["tokens", "documents", "bytes"])
def test_held_out_rows_are_the_batches_of_the_evaluation(data, tmp_path):
    config = made_run(tmp_path, DATA[data])
    rows = held_out_rows(config.data, max_windows=config.evaluation.max_windows)
    batches = list(open_held_out_data(config, ParallelContext.single().data))
    for name in ("tokens", "labels"):
        ours = np.stack([getattr(row, name) for row in rows])
        theirs = np.concatenate([getattr(batch, name).numpy() for batch in batches])
        assert np.array_equal(ours, theirs[: len(ours)]), name
        if name == "labels":
            assert (theirs[len(ours) :] == -100).all()


def test_permuted_is_a_bijection():
    for size in (1, 2, 7, 100):
        assert sorted(permuted(i, size, key=(1, 0, "a")) for i in range(size)) == list(range(size))


def test_sources_are_interleaved_by_weight():
    first = interleaved({"b": 1.0, "a": 3.0})[:400]
    assert first.count("a") == 300


def test_a_corpus_is_made_of_every_source(tmp_path):
    config = made_run(tmp_path, DATA["mix"])
    assert isinstance(config.data, DataConfig)
    assert [source.name for source in config.data.train] == ["a", "b", "c"]
    assert all(Path(f"{source.path}.bin").is_file() for source in config.data.train)
