"""A diverged rank is found by name at the next check, and nothing is saved."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.engine.engine import PlainEngine, StageEngine
from pretrain.errors import TrainingError
from pretrain.stability.replica_check import digest
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data


def _flip(tensor: torch.Tensor) -> None:
    bits = tensor.detach().view(torch.int32).view(-1)
    bits[5] ^= 1 << 3


def _train(config, rank: int, name: str, after: int, change=_flip) -> str:
    """Train with a parameter changed, by one bit, on one rank after a step."""
    if int(os.environ["RANK"]) == rank:
        for engine in (PlainEngine, StageEngine):
            engine.train_step = _changing(engine.train_step, name, after, change)
    try:
        run_training(config)
    except TrainingError as error:
        return str(error)
    return "nothing was found"


def _changing(train_step, name: str, after: int, change):
    steps = 0

    def step(self, *args, **kwargs):
        nonlocal steps
        result = train_step(self, *args, **kwargs)
        steps += 1
        if steps == after:
            change(self.module.get_parameter(name))
        return result

    return step


def _run(tmp_path: Path, layout: dict[str, object], *, interval: int = 2):
    write_data(tmp_path)
    lasting = {"training__max_steps": 8, "training__lr": 1e-9, "checkpoint__interval": 6}
    return tiny_run(tmp_path, **lasting, watchdog__replica_interval=interval, **layout)


@pytest.mark.parametrize(
    ("layout", "ranks", "rank", "name", "after", "who"),
    [
        ({}, 3, 2, "block_1.attention.query.weight", 4, "rank 2 differs from the others"),
        ({"parallel__tensor": 2}, 2, 1, "block_2.mlp_norm.weight", 3, "ranks 0, 1 differs"),
        ({"parallel__pipeline": 2, "training__batch_size": 2}, 4, 3, "block_3.mlp.up.weight", 4,
         "ranks 2, 3 differs"),
    ],
    ids=["data 3", "tensor 2", "pipeline 2 x data 2"],
)  # fmt: skip
def test_a_flipped_bit_is_found_at_the_next_check(layout, ranks, rank, name, after, who, tmp_path):
    # A step of ZeRO overwrites the copies of data ranks, those of tensor ranks stay as they are.
    config = _run(tmp_path, layout)
    said = run_ranks(_train, ranks, config, rank, name, after, init=False)
    assert len(set(said)) == 1
    assert re.match(rf"after step 4 {re.escape(name)} of {who}", said[0]), said[0]
    assert not list(Path(config.run_dir, "checkpoints").glob("step_*"))


def test_before_a_save_ranks_are_compared_whatever_the_interval(tmp_path):
    config = _run(tmp_path, {}, interval=1000)
    said = run_ranks(_train, 2, config, 1, "head.norm.weight", 6, init=False)
    assert said[0].startswith("after step 6 head.norm.weight of ranks 0, 1 differs")
    assert not list(Path(config.run_dir, "checkpoints").glob("step_*"))


def _grow(factor: float):
    def change(tensor: torch.Tensor) -> None:
        tensor.detach().mul_(factor)

    return change


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1.01, r"after step 4 head\.output\.weight of rank 1 differs by 1\.0e-02 of its norm from the "
      "copy of rank 0 that it is tied to: "), (1 + 1e-6, "nothing was found$")],
    ids=["a copy that trains by itself", "sums that round apart"],
)  # fmt: skip
def test_a_tied_copy_that_leaves_the_other_is_found(factor, expected, tmp_path):
    tied = {"parallel__pipeline": 2, "model__tie_embeddings": True, "training__max_steps": 4}
    write_data(tmp_path)
    config = tiny_run(tmp_path, **tied, training__lr=1e-9, checkpoint__interval=4)
    said = run_ranks(_train, 2, config, 1, "head.output.weight", 4, _grow(factor), init=False)
    assert len(set(said)) == 1
    assert re.match(expected, said[0]), said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_flipped_bit_changes_the_digest(dtype):
    tensor = torch.zeros(64, dtype=dtype)
    before = digest(tensor)
    for index in (0, 63):
        changed = tensor.clone()
        changed[index] = 1
        assert digest(changed) != before
