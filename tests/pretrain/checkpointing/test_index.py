"""The index of a checkpoint: what every file holds, from what every rank has written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.weights import ShardPosition, Weight
from parallel.sharding import Sharding
from pretrain.checkpointing import CheckpointContents
from pretrain.checkpointing.index import (
    INDEX_NAME,
    FlatRange,
    collect_optimizer,
    parse_index,
    read_index,
)
from pretrain.checkpointing.optimizer_shards import MASTER, MOMENTS, OptimizerShard, StoredOptimizer
from pretrain.distributed.consensus import RankGroup
from tests.distributed import run_ranks
from tests.pretrain.checkpointing.fixtures import contents, flip_bit, open_store
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=CheckpointError)


def whole_contents(rank: int, *, missing: int = 0) -> CheckpointContents:
    """Parameter w of 10 elements; rank 0 writes 4 of them, rank 1 the others but `missing`."""
    start, stop = (0, 4) if rank == 0 else (4, 10 - missing)
    elements = [
        Weight(f"w/{key}", (stop - start,), torch.float32, Sharding(), lambda: values)
        for key in (MASTER, *MOMENTS)
    ]
    values = torch.arange(float(start), float(stop))
    span = FlatRange(
        shape=(10,), dim=None, full_size=None, shard=0, num_shards=1,
        start=start, length=stop - start, step=3,
    )  # fmt: skip
    return contents(1, ranks=RankGroup.of_world(timeout=None))._replace(
        write_engine=None, optimizer=lambda: OptimizerShard(elements, [], {"w": span})
    )


def save(run_dir: Path, *, missing: int = 0, as_stages: bool = False) -> str | None:
    ranks = RankGroup.of_world(timeout=None)
    written = whole_contents(ranks.rank, missing=missing)
    if as_stages:
        written = written._replace(position=ShardPosition(ranks.rank, ranks.size))
    try:
        open_store(run_dir, ranks=ranks).save(written)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of two ranks."""
    assert run_ranks(save, 2, tmp_path) == [None, None]
    return tmp_path / "checkpoints" / "step_1"


def test_a_save_writes_what_the_files_say(checkpoint: Path) -> None:
    written = parse_index(read_index(checkpoint), source=checkpoint)
    assert written.optimizer == collect_optimizer(checkpoint / "optimizer")
    assert written.optimizer["w"].pieces == [(0, 0, 0, 4, 3), (1, 0, 4, 6, 3)]
    assert written.weights == (1, 2, {"w": (0, 0, 4)})
    (checkpoint / INDEX_NAME).rename(checkpoint.parent / INDEX_NAME)
    assert parse_index(read_index(checkpoint), source=checkpoint) == written
    full = StoredOptimizer(checkpoint / "optimizer", written.optimizer).full()
    assert torch.equal(full[MASTER]["w"], torch.arange(10.0))


def test_the_manifest_vouches_for_the_index(checkpoint: Path) -> None:
    flip_bit(checkpoint / INDEX_NAME, 100)
    with _refused("checkpoints", value=INDEX_NAME, constraint="sha256", remedy="restore"):
        open_store(checkpoint.parents[1]).find("must")


def test_a_save_that_lacks_elements_is_not_published(tmp_path: Path) -> None:
    messages = run_ranks(save, 2, tmp_path, missing=1)
    assert messages[0] == messages[1]
    assert "step_1 was not saved: parameter 'w', slice 0: " in messages[0]
    assert "elements 9 to 10 is missing" in messages[0]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_weight_that_two_stages_write_is_not_published(tmp_path: Path) -> None:
    messages = run_ranks(save, 2, tmp_path, as_stages=True)
    assert messages[0] == messages[1]
    assert "step_1 was not saved: weight 'w' " in messages[0]
    assert not list((tmp_path / "checkpoints").iterdir())


def changed(raw: bytes, **changes: Any) -> bytes:
    content = json.loads(raw)
    content["optimizer"]["w"] |= changes
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": [[0, 0, 0, 4, 3], [1, 0, 5, 6, 3]]}, "elements 4 to 5 is missing"),
        ({"num_shards": 10**12, "dim": 0, "full_size": 10}, "slice 1: .* is missing"),
        ({"dim": 1, "full_size": 10}, "expected 10 along dimension 1"),
        ({"dim": 0, "full_size": 11}, "expected 11 along dimension 0"),
        ({"dim": 0, "full_size": None}, "expected None along dimension 0"),
        ({"shape": []}, "slice 0: .* 0 to 1 "),
    ],
    ids=str,
)
def test_an_index_that_is_wrong_is_refused_by_parameter(changes, message, checkpoint) -> None:
    index = parse_index(changed(read_index(checkpoint), **changes), source=checkpoint)
    with pytest.raises(CheckpointError, match=message):
        StoredOptimizer(checkpoint / "optimizer", index.optimizer).parameter("w")


@pytest.mark.parametrize(
    ("pieces", "file"),
    [
        ([[0, 0, 0, 4, 9], [1, 0, 4, 6, 9]], "rank_00000"),  # of a later step
        ([[1, 0, 0, 6, 3], [0, 0, 6, 4, 3]], "rank_00000"),  # the files in each other's places
        ([[0, 0, 0, 4, 3], [2, 0, 4, 6, 3]], "rank_00002"),
    ],
    ids=["step", "order", "rank"],
)
def test_an_index_that_a_file_contradicts_is_refused(pieces, file, checkpoint) -> None:
    """Whatever checksum it has: what a rank reads is what the files themselves say."""
    index = parse_index(changed(read_index(checkpoint), pieces=pieces), source=checkpoint)
    if file == "rank_00002":
        files = checkpoint / "optimizer"
        (files / f"{file}.safetensors").write_bytes((files / "rank_00000.safetensors").read_bytes())
    stored = StoredOptimizer(checkpoint / "optimizer", index.optimizer)
    stored.check()
    with _refused(file, value="'w'", constraint="'start'", remedy="restore"):
        stored.full()


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"", "JSON"),
        (b"\xff", "JSON"),
        (b"{" * 5000, "JSON"),
        (b"[]", "object"),
        (b"{}", "optimizer"),
        (b'{"optimizer": {"w": 1}, "weights": {}}', "optimizer.w"),
        (
            b'{"optimizer": {}, "weights": {"pipeline_size": 0, "tensor_size": 1, "places": {}}}',
            "weights.pipeline_size",
        ),
    ],
)
def test_an_index_that_is_something_else_is_refused(raw, place, tmp_path) -> None:
    with _refused(INDEX_NAME, value=place, constraint="is not the index", remedy="copy"):
        parse_index(raw, source=tmp_path / INDEX_NAME)


def test_an_index_of_a_later_version_is_refused_as_such(checkpoint: Path) -> None:
    content = json.loads(read_index(checkpoint)) | {"version": 2}
    with _refused(INDEX_NAME, value="version", constraint="not know", remedy="version that wrote"):
        parse_index(json.dumps(content).encode(), source=checkpoint / INDEX_NAME)
