"""A run small enough that hundreds of checkpoints of it can be written in a second."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint.manifest import Layout
from parallel.checkpoint.storage import Storage
from parallel.checkpoint.weights import ShardPosition, Weight
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from parallel.sharding import Sharding
from pretrain.checkpointing.rank_files import CheckpointContents
from pretrain.checkpointing.rng_state import rng_states
from pretrain.checkpointing.selection import Checkpoint, RunIdentity
from pretrain.checkpointing.store import CheckpointStore
from pretrain.distributed.consensus import RankGroup


def identity(
    *, layout: Layout | None = None, config: dict[str, Any] | None = None, data: str = "abc"
) -> RunIdentity:
    return RunIdentity(
        layout=layout or Layout(),
        config=config or {"run_dir": "x", "training": {"lr": 0.1, "seed": 1}},
        fingerprints={"data": data},
    )


def open_store(
    run_dir: Path,
    *,
    run: RunIdentity | None = None,
    keep: int = 2,
    keep_every: int | None = None,
    ranks: RankGroup | None = None,
    storage: Storage | None = None,
) -> CheckpointStore:
    return CheckpointStore(
        run_dir,
        identity=run or identity(),
        keep=keep,
        keep_every=keep_every,
        ranks=ranks or RankGroup(),
        storage=storage,
    )


def contents(
    step: int,
    *,
    ranks: RankGroup | None = None,
    storage: Storage | None = None,
    write_engine: Callable[[Path], Sequence[Path]] | None = None,
) -> CheckpointContents:
    """Everything in it says which step and rank it is of. Tensor ranks are the ranks."""
    rank, size = (ranks or RankGroup())[:2]
    value = torch.full((2, 3), float(step + rank))
    sharding = Sharding(dim=0, full_size=2 * size)

    def default_engine(directory: Path) -> list[Path]:
        path = directory / "engine" / f"rank_{rank}.pt"
        path.parent.mkdir(exist_ok=True)
        (storage or Storage()).point("write", path)
        path.write_text(f"step {step} rank {rank}")
        return [path]

    return CheckpointContents(
        step=step,
        write_engine=write_engine or default_engine,
        rng=rng_states(),
        weights=[Weight("w", (2, 3), torch.float32, sharding, lambda: value)],
        trainer={"step": step, "tokens": step * 100},
        position=ShardPosition(tensor_rank=rank, tensor_size=size),
        weights_metadata={"model": "{}"},
    )


def assert_holds(checkpoint: Checkpoint | None, step: int, *, num_ranks: int = 1) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.trainer == {"step": step, "tokens": step * 100}
    for rank in range(num_ranks):
        assert checkpoint.rng_path(rank).is_file()
        text = (checkpoint.path / "engine" / f"rank_{rank}.pt").read_text()
        assert text == f"step {step} rank {rank}"
    with ShardedWeightsReader(checkpoint.path) as reader:
        rows = torch.arange(step, step + num_ranks, dtype=torch.float32).repeat_interleave(2)
        assert torch.equal(reader.full("w"), rows[:, None].expand(-1, 3))


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << random.Random(position).randrange(8)
    path.write_bytes(data)
