"""Runs at every kind of layout that two cores can hold, and the comparisons between them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.checkpoint.tensor_file import TensorFile
from parallel.checkpoint.weights import ShardPosition, write_shard
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from pretrain.checkpointing.index import FOLDER, shard_name
from pretrain.checkpointing.optimizer_shards import StoredOptimizer
from pretrain.engine.deepspeed_optimizer import OptimizerView
from pretrain.errors import EXIT_COMPLETED
from pretrain.loop import TrainLoop
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.layout import Layout
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run, write_data

SAVED, STEPS = 4, 7


LAYOUTS = {
    "ZeRO-0": Layout(stage=0),
    "ZeRO-1": Layout(),
    "ZeRO-1 DP2": Layout(data=2),
    "ZeRO-2 DP2": Layout(data=2, stage=2),
    "ZeRO-3 DP2": Layout(data=2, stage=3),
    "TP2": Layout(tensor=2),
    "TP2 SP": Layout(tensor=2, sequence_parallel=True),
    "TP4": Layout(tensor=4),
    "TP2 DP2 ZeRO-3": Layout(tensor=2, data=2, stage=3),
    "PP2": Layout(pipeline=2),
    "PP4": Layout(pipeline=4),
    "PP2 TP2": Layout(pipeline=2, tensor=2),
    "PP2 DP2": Layout(pipeline=2, data=2),
}
# Tied embeddings; a vocabulary of 61 leaves padding rows at 2 and at 4 tensor ranks.
LLAMA = CASES["llama_qwen2_shape"].config.model_copy(update={"num_kv_heads": 4, "init_std": 0.1})
MODELS = {
    "llama": LLAMA,
    "daria_former": CASES["daria_former"].config,
    "mod": CASES["mod"].config,  # layers with a threshold that is updated after every step
    # In bf16 the scores of two layouts differ by rounding and now and then choose another token,
    # which no bound covers; these are the same numbers everywhere.
    "mod_random_scores": CASES["mod"].config.model_copy(update={"router_score": "random"}),
}


class Origin(NamedTuple):
    """The whole run at one layout, which has left a checkpoint after `SAVED` steps."""

    run_dir: Path
    curve: list[dict[str, float]]
    evaluation: float


class Runs:
    """Trains at each layout once, below `directory`."""

    def __init__(self, directory: Path) -> None:
        write_data(directory)
        self.directory = directory
        self._origins: dict[tuple[str, str, str], Origin] = {}

    def config(self, family: str, precision: str, place: str, run_dir: Path, **changes: Any):
        return tiny_run(
            self.directory,
            run_dir=str(run_dir),
            model=MODELS[family].model_dump(),
            training__max_steps=STEPS,
            checkpoint__interval=SAVED,
            evaluation__interval=STEPS,
            **{"training__precision": precision, **LAYOUTS[place].changes, **changes},
        )

    def origin(self, family: str, precision: str, place: str) -> Origin:
        key = (family, precision, place)
        if key not in self._origins:
            run_dir = self.directory / f"origin_{len(self._origins)}"
            config = self.config(*key, run_dir)
            train(config, LAYOUTS[place])
            self._origins[key] = Origin(run_dir, *tail(config))
        return self._origins[key]


def train(config, place: Layout, entry=run_training, *, ds_config_path: str | None = None) -> None:
    json_file = ds_config_path or f"configs/ds/zero{place.stage}.json"
    codes = run_ranks(entry, place.world_size, config, json_file, init=False)
    assert codes == [EXIT_COMPLETED] * place.world_size


def tail(config) -> tuple[list[dict[str, float]], float]:
    """The log after the checkpoint, and the last evaluation."""
    trained, evaluated = metrics(config)
    return [r for r in trained if r["step"] > SAVED], evaluated[-1]["eval_loss"]


def begin_at_checkpoint(origin: Origin, run_dir: Path) -> None:
    """A run directory as if the job had ended after `SAVED` steps."""
    shutil.copytree(
        origin.run_dir / "checkpoints" / f"step_{SAVED}", run_dir / "checkpoints" / f"step_{SAVED}"
    )


def saved_again(config, ds_config_path: str) -> int:
    """`run` that also writes what it has just restored, before its first step."""
    restore = TrainLoop.restore

    def restore_and_save(self, checkpoint):
        restore(self, checkpoint)
        copy = Path(config.run_dir, "copy")
        for folder in ("weights", FOLDER):
            (copy / folder).mkdir(parents=True, exist_ok=True)
        position = ShardPosition.of(self.ctx)
        shard = self.engine.optimizer_shard()
        with open(copy / FOLDER / shard_name(self.ranks.rank), "wb") as file:
            write_shard(file, shard.elements, position=position, metadata=shard.metadata)
        path = copy / "weights" / position.file_name if self.ctx.data.rank == 0 else os.devnull
        with open(path, "wb") as file:
            write_shard(file, self.engine.weights(), position=position)

    TrainLoop.restore = restore_and_save
    return run_training(config, ds_config_path)


class Reads(NamedTuple):
    """What a rank opened while it restored, file by file, and what it read of tensors.

    `updated`: bytes of masters and moments that it updates.
    """

    opened: list[str]
    optimizer_bytes: int
    weight_bytes: int
    updated: int


def restored_and_counted(config, ds_config_path: str) -> Reads:
    """`saved_again` that ends before the first step and returns what restoring has read."""
    opened: list[str] = []
    read: dict[str, int] = {"optimizer": 0, "weights": 0}
    init, read_tensor, updated = TensorFile.__init__, TensorFile.read, []

    def counting_init(self, path):
        opened.append(str(path.relative_to(path.parents[1])))
        init(self, path)

    def counting_read(self, name, *ranges):
        tensor = read_tensor(self, name, *ranges)
        folder = self.path.parent.name
        read[folder] = read.get(folder, 0) + tensor.numel() * tensor.element_size()
        return tensor

    def restore(self, checkpoint):
        TensorFile.__init__, TensorFile.read = counting_init, counting_read
        original(self, checkpoint)
        TensorFile.__init__, TensorFile.read = init, read_tensor
        view = OptimizerView(self.engine._deepspeed, data_size=self.ctx.data.size)
        updated.append(3 * 4 * sum(fragment.length for fragment in view.fragments))

    original = TrainLoop.restore
    TrainLoop.restore = restore
    TrainLoop.run = lambda self, stop: EXIT_COMPLETED
    assert saved_again(config, ds_config_path) == EXIT_COMPLETED
    return Reads(opened, read["optimizer"], read["weights"], *updated)


def state(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, buffer, master, moment and step count of a checkpoint, merged."""
    with ShardedWeightsReader(directory / "weights") as reader:
        yield from reader.items()
    stored = StoredOptimizer(directory / "optimizer")
    for name in sorted(stored.names()):
        yield f"{name} steps", torch.tensor(sorted(stored.steps(name)))
    for key, tensors in stored.full().items():
        for name, tensor in tensors.items():
            yield f"{name} {key}", tensor


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    with ShardedWeightsReader(run_dir / "checkpoints" / f"step_{STEPS}") as reader:
        return {name: weight.float() for name, weight in reader.items()}


def assert_same_state(found: Path, expected: Path) -> None:
    restored, saved = dict(state(found)), dict(state(expected))
    assert saved.keys() == restored.keys()
    for name, tensor in saved.items():
        assert restored[name].dtype == tensor.dtype, name
        assert torch.equal(restored[name], tensor), name
