"""A complete run that takes a second: a tiny llama on a corpus made here."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.checkpoint.weights_reader import ShardedWeightsReader
from pretrain.config import RunConfig, parse_config, to_yaml
from pretrain.loop import TrainLoop
from tests.data_tools.corpora import write_corpus
from tests.pretrain.run_training import run_training

VOCAB, SEQ = 61, 32


def write_data(directory: Path) -> None:
    """A corpus with something to learn: every token is likely to be followed by one of three."""
    generator = np.random.default_rng(0)
    # Held out: seven windows, the last of which is not full, so that a batch is not full either.
    for name, documents in (("train", 60), ("validation", 3)):
        rows = []
        for _ in range(documents):
            steps = generator.choice([1, 2, 5], size=generator.integers(40, 90))
            rows.append((generator.integers(VOCAB) + np.cumsum(steps)) % VOCAB)
        write_corpus(directory / name, rows, vocab_size=VOCAB, num_bytes=sum(map(len, rows)) * 3)


def tiny_run(directory: Path, **changes: Any) -> RunConfig:
    """The configuration; `section__key=value` changes a setting."""
    values: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "model": {
            "family": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "max_position_embeddings": SEQ,
            "init_std": 0.1,
        },
        "data": {
            "train": str(directory / "train"),
            "validation": str(directory / "validation"),
            "sequence_length": SEQ,
        },
        "training": {
            "max_steps": 4,
            "warmup_steps": 1,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "lr": 1e-2,
            "grad_clip": 0.5,
            "precision": "fp32",
            "log_interval": 1,
            "seed": 3,
        },
        "checkpoint": {"interval": 2, "keep": 2},
        "evaluation": {"interval": 2},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return parse_config(values)


def zero_file(zero: int | dict[str, Any], directory: Path) -> str:
    """The DeepSpeed file of a ZeRO stage, or one written here of a section of its own."""
    if isinstance(zero, int):
        return f"configs/ds/zero{zero}.json"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def offloading(stage: int) -> dict[str, Any]:
    """A ZeRO section whose optimizer, at stage 3 also the parameters, is in host memory."""
    names = ("offload_optimizer", "offload_param")[: 2 if stage == 3 else 1]
    return {"stage": stage, **{name: {"device": "cpu"} for name in names}}


def metrics(config: RunConfig) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The training lines and the evaluation lines of a finished run."""
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]


def curve(config: RunConfig) -> list[tuple[float, ...]]:
    """The logged values in which two equal runs agree, bit for bit."""
    trained, evaluated = metrics(config)
    losses = [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in trained]
    return losses + [(r["step"], r["eval_loss"]) for r in evaluated]


def final_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Every weight of the checkpoint that ends a run."""
    step = f"step_{config.training.max_steps}"
    with ShardedWeightsReader(Path(config.run_dir, "checkpoints", step, "weights")) as reader:
        return dict(reader.items())


def write_endless_run(directory: Path) -> None:
    """The run file `tiny` of a run of two data ranks that neither ends nor saves; its corpus."""
    write_data(directory)
    config = tiny_run(
        directory,
        training__max_steps=1_000_000,
        training__batch_size=2,
        checkpoint__interval=1_000_000,
        evaluation__interval=1_000_000,
    )
    (directory / "tiny.yaml").write_text(to_yaml(config))


def stopped_after(step: int) -> Callable[[RunConfig, str | None], Any]:
    """`run_training`, asked to stop in the step of this number."""

    def entry(config: RunConfig, ds_config_path: str | None) -> Any:
        original, count = TrainLoop._prepare, 0

        def prepare(self, *, first: bool) -> None:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, first=first)

        TrainLoop._prepare = prepare  # for good: each rank is a process of its own
        return run_training(config, ds_config_path)

    return entry
