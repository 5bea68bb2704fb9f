"""Reader of a run's checkpoints and metrics.jsonl: whole tensors by parameter name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.checkpoint.weights_reader import ShardedWeightsReader
from parallel.sharding import Sharding
from pretrain.checkpointing.index import FOLDER
from pretrain.checkpointing.optimizer_shards import MASTER, MOMENTS, StoredOptimizer
from pretrain.prove.truth.oracle import State


class Saved(NamedTuple):
    """A checkpoint of any layout, in fp64. Optimizer tensors of stacked experts are stacked again.

    `dtype`: of the weights that the forward pass reads. `masters` is empty where only DeepSpeed can
    save the optimizer.
    """

    dtype: torch.dtype
    weights: dict[str, Tensor]
    masters: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    buffers: dict[str, Tensor]
    steps: set[int]
    owners: Owners

    def state(self) -> State:
        """The state that the next step begins with."""
        return State(
            self.masters, self.exp_avg, self.exp_avg_sq, self.buffers, max(self.steps, default=0)
        )


class Owners(NamedTuple):
    """The ranks that update the elements of parameters."""

    optimizer: StoredOptimizer | None

    def rank_of(self, name: str, index: int, shape: torch.Size) -> str:
        """The rank (and its tensor rank) that updates an element of the flattened parameter."""
        if self.optimizer is None:
            return ""
        place = list(np.unravel_index(index, shape)) if shape else []
        if name not in self.optimizer.names() and place:  # stacked experts are saved one by one
            name, place = f"{name}.{int(place[0])}", place[1:]
        if name not in self.optimizer.names():
            return ""  # a layer state, which every rank holds
        stored = self.optimizer.parameter(name)
        shard, at = _in_shard([int(x) for x in place], stored.sharding, stored.shard_shape)
        for piece in stored.shards[shard]:
            if piece.start <= at < piece.stop:
                tensor_rank = f" (tensor {shard})" * (stored.sharding.dim is not None)
                return f"rank {piece.rank}{tensor_rank}"
        return ""


def _in_shard(place: list[int], sharding: Sharding, shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of the slice that holds an element, and its index there."""
    shard = 0
    if sharding.dim is not None:
        shard, place[sharding.dim] = divmod(place[sharding.dim], shape[sharding.dim])
    index = 0
    for position, size in zip(place, shape, strict=True):
        index = index * size + position
    return shard, index


def read_checkpoint(run_dir: Path, step: int) -> Saved:
    """Read checkpoint `step` of a run."""
    path = run_dir / "checkpoints" / f"step_{step}"
    with ShardedWeightsReader(path / "weights") as reader:
        stored_weights = dict(reader.items())
    dtype = next(iter(stored_weights.values())).dtype
    weights = {name: tensor.double() for name, tensor in stored_weights.items()}
    if not (path / FOLDER).is_dir():
        return Saved(dtype, weights, {}, {}, {}, {}, set(), Owners(None))
    stored = StoredOptimizer(path / FOLDER)
    names = sorted(stored.names(), key=_numbered)
    steps = {step for name in names for step in stored.steps(name)}
    full = stored.full()
    masters, first, second = (
        _stacked({name: full[key][name].double() for name in names}, weights)
        for key in (MASTER, *MOMENTS)
    )
    buffers = {name: tensor for name, tensor in weights.items() if name not in masters}
    return Saved(dtype, weights, masters, first, second, buffers, steps, Owners(stored))


def _numbered(name: str) -> tuple[str, int]:
    head, _, tail = name.rpartition(".")
    return (head, int(tail)) if tail.isdecimal() else (name, -1)


def _stacked(parts: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the experts `NAME.0`, `NAME.1`, ... of a parameter NAME."""
    whole: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in parts.items():
        if name in weights:
            whole[name] = tensor
        else:
            experts.setdefault(name.rpartition(".")[0], []).append(tensor)
    return whole | {name: torch.stack(each) for name, each in experts.items()}


def read_metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> everything that metrics.jsonl says about it, training and evaluation together."""
    found: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {}).update(record)
    return found
