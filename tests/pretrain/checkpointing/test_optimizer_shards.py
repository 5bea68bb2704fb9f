"""Optimizer state is read back whole or not at all, whatever slices it was written in."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parallel.checkpoint.errors import CheckpointError
from parallel.context import Axis
from parallel.sharding import Sharding, split
from pretrain.checkpointing.index import HEADER, FlatRange, join_headers
from pretrain.checkpointing.optimizer_shards import StoredOptimizer, Wanted
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=CheckpointError)

KEYS = ("master", "exp_avg", "exp_avg_sq")


def write_rank(
    directory: Path, rank: int, runs: dict[str, dict[str, Any]], values: dict[str, torch.Tensor]
) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / f"rank_{rank:05d}.safetensors"
    save_file(values, path, metadata={HEADER: json.dumps(runs)})


def write_parameter(
    directory: Path, full: torch.Tensor, sharding: Sharding, *, tensor_size: int, data_size: int
) -> None:
    """`full` as `data_size` data ranks of each tensor rank hold it, cut at random places."""
    generator = random.Random(full.numel())
    for shard in range(tensor_size if sharding.dim is not None else 1):
        part = split(full, sharding, size=tensor_size, rank=shard)
        cuts = sorted(generator.randint(0, part.numel()) for _ in range(data_size - 1))
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, part.numel()], strict=True)):
            run = {
                "shape": list(part.shape),
                "dim": sharding.dim,
                "full_size": sharding.full_size,
                "shard": shard,
                "num_shards": tensor_size,
                "start": start,
                "length": stop - start,
                "step": 4,
            }
            elements = part.reshape(-1)[start:stop].clone()
            values = {f"w/{key}": elements + i for i, key in enumerate(KEYS)}
            write_rank(directory, shard * data_size + number, {"w": run}, values)


SHAPES = {
    "scalar": ((), Sharding()),
    "vector": ((7,), Sharding()),
    "cut vector": ((10,), Sharding(dim=0, full_size=10)),
    "matrix": ((5, 3), Sharding()),
    "rows": ((11, 3), Sharding(dim=0, full_size=11)),
    "columns": ((5, 8), Sharding(dim=1, full_size=8)),
    "uneven columns": ((5, 7), Sharding(dim=1, full_size=7)),
    "experts": ((3, 4, 6), Sharding(dim=2, full_size=6)),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 4), (4, 2), (3, 5)])
def test_any_elements_of_any_slice_are_those_of_the_full_tensor(kind, old, new, tmp_path) -> None:
    shape, sharding = SHAPES[kind]
    full = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)
    write_parameter(tmp_path, full, sharding, tensor_size=old, data_size=3)
    stored = StoredOptimizer(tmp_path)
    assert stored.parameter("w").shape == shape
    assert stored.steps("w") == {4}
    for rank in range(new):
        # Padding rows hold zero, not key: they are cut off the one and added to the other.
        expected = {
            key: split(full + i, sharding, size=new, rank=rank).reshape(-1)
            for i, key in enumerate(KEYS)
        }
        wanted = [
            Wanted("w", start, {key: torch.full((length,), torch.nan) for key in KEYS})
            for start in range(0, expected["master"].numel(), 1 + full.numel() // 24)
            for length in {1, 4, 9, expected["master"].numel() - start}
            if start + length <= expected["master"].numel()
        ]
        stored.read(wanted, tensor=Axis(size=new, rank=rank), progress=str)
        for each in wanted:
            for key, found in each.into.items():
                assert torch.equal(found, expected[key][each.start : each.stop])
    merged = stored.full()
    assert all(torch.equal(merged[key]["w"], full + i) for i, key in enumerate(KEYS))


def headers_of(
    pipeline: int, tensor: int, data: int
) -> tuple[dict[int, dict[str, FlatRange]], dict[int, list[Wanted]]]:
    """What each rank of a run with ZeRO-1 writes, and what it wants back: a block of each stage,
    half of it cut along dimension 1, flattened and cut into equal parts over data ranks."""
    shapes = {"up": ((64, 16), 0), "down": ((16, 64), 1), "norm": ((16,), None)}
    headers: dict[int, dict[str, FlatRange]] = {}
    wanted: dict[int, list[Wanted]] = {}
    for stage, shard in itertools.product(range(pipeline), range(tensor)):
        position, part = 0, -(-(2 * 1024 // tensor + 16) // data)
        for name, (full, dim) in shapes.items():
            shape = [n // tensor if d == dim else n for d, n in enumerate(full)]
            end, begin = position + math.prod(shape), position
            while position < end:
                owner, stop = position // part, min(end, (position // part + 1) * part)
                rank, start = (stage * data + owner) * tensor + shard, position - begin
                span = FlatRange(
                    shape=tuple(shape), dim=dim, full_size=None if dim is None else full[dim],
                    shard=shard, num_shards=tensor, start=start, length=stop - position, step=1,
                )  # fmt: skip
                own = {"master": torch.empty(span.length, device="meta")}
                wanted.setdefault(rank, []).append(Wanted(f"{stage}.{name}", start, own))
                written = headers.setdefault(rank, {})
                if dim is not None or shard == 0:
                    written[f"{stage}.{name}"] = span
                position = stop
    return headers, wanted


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(2, 2, 2), (8, 8, 16)])
def test_a_rank_opens_no_more_files_in_a_larger_run(pipeline, tensor, data, tmp_path) -> None:
    headers, wanted = headers_of(pipeline, tensor, data)
    stored = StoredOptimizer(tmp_path, join_headers(headers.items(), directory=tmp_path))
    stored.check()
    for rank, own in wanted.items():
        first = rank - rank % tensor  # it wrote what all tensor ranks hold
        files = stored.plan(own, tensor=Axis(size=tensor, rank=rank % tensor))
        assert set(files) <= {first, rank}
        elements = sum(copy.rows * copy.columns for copies in files.values() for copy in copies)
        assert elements == sum(each.stop - each.start for each in own)
    assert len(wanted) == pipeline * tensor * data


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Parameter w of shape [6, 2], rows cut over 2 tensor ranks, each over 2 data ranks."""
    full = torch.arange(12.0).reshape(6, 2)
    sharding = Sharding(dim=0, full_size=6)
    write_parameter(tmp_path / "optimizer", full, sharding, tensor_size=2, data_size=2)
    return tmp_path / "optimizer"


def change_run(directory: Path, rank: int, **changes: Any) -> None:
    path = directory / f"rank_{rank:05d}.safetensors"
    values = load_file(path)
    run = {
        "shape": [3, 2],
        "dim": 0,
        "full_size": 6,
        "shard": rank // 2,
        "num_shards": 2,
        "start": 0 if rank % 2 == 0 else 6 - len(values["w/master"]),
        "length": len(values["w/master"]),
        "step": 4,
    }
    write_rank(directory, rank, {"w": {**run, **changes}}, values)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a rank's file is missing": (
        lambda d: (d / "rank_00001.safetensors").unlink(),
        r"'w', slice 0: optimizer state of elements .* to 6 is missing",
    ),
    "a whole slice is missing": (
        lambda d: [(d / f"rank_0000{i}.safetensors").unlink() for i in (2, 3)],
        r"'w', slice 1: optimizer state of elements 0 to 6 is missing",
    ),
    "a file is there twice": (
        lambda d: (d / "rank_00009.safetensors").write_bytes(
            (d / "rank_00003.safetensors").read_bytes()
        ),
        r"'w', slice 1: .* missing or duplicate before '.*rank_0000[39].safetensors'",
    ),
    "another cut": (lambda d: change_run(d, 3, num_shards=3), "keep the files of one checkpoint"),
    "another shape": (lambda d: change_run(d, 3, shape=[2, 3]), "keep the files of one checkpoint"),
    "a slice too many": (lambda d: change_run(d, 3, shard=2), "keep the files of one checkpoint"),
    "an unknown field": (lambda d: change_run(d, 3, note=1), "has no valid header"),
    "no header": (
        lambda d: save_file({"x": torch.ones(1)}, d / "rank_00001.safetensors"),
        "has no valid header",
    ),
    "not safetensors": (
        lambda d: (d / "rank_00001.safetensors").write_bytes(b"x" * 100),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_complete_is_refused_by_name(damage, directory) -> None:
    change, message = DAMAGES[damage]
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        StoredOptimizer(directory).check()


def read(directory: Path, name: str, key: str) -> None:
    """Read the first elements of slice 1 of 2."""
    wanted = Wanted(name, 0, {key: torch.empty(2)})
    StoredOptimizer(directory).read([wanted], tensor=Axis(size=2, rank=1), progress=str)


def test_a_moment_that_is_missing_is_refused(directory) -> None:
    with _refused(
        "rank_00002.safetensors", value="w/momentum", constraint="cannot be read", remedy="copy"
    ):
        read(directory, "w", "momentum")


@pytest.mark.parametrize("other", [torch.ones(6).bfloat16(), torch.ones(99)])
def test_a_moment_of_another_kind_is_refused(other, directory) -> None:
    path = directory / "rank_00002.safetensors"
    with safe_open(path, framework="pt") as file:
        runs = json.loads(file.metadata()[HEADER])
    write_rank(directory, 2, runs, {**load_file(path), "w/exp_avg": other})
    with _refused(path.name, value="w/exp_avg", constraint="expected F32 [", remedy="copy"):
        read(directory, "w", "exp_avg")


def test_a_parameter_that_the_checkpoint_does_not_have_is_refused(directory) -> None:
    with assert_refused(
        "optimizer", value="'v'", constraint="model", remedy="configuration", error=CheckpointError
    ):
        read(directory, "v", "master")
