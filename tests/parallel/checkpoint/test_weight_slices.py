"""A rank's slices of stored weights equal those of the merged tensors, from the files that hold
them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parallel.checkpoint.tensor_file import TensorFile
from parallel.checkpoint.weight_slices import WeightPlace, WeightSlices, WeightsTable
from parallel.checkpoint.weights import ShardPosition, Weight, WeightsError, write_shard
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from parallel.context import Axis
from parallel.sharding import Sharding, split
from tests.parallel.checkpoint.test_weights import SHARDINGS, full_weights, write_grid
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=WeightsError)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files opened in the test."""
    names: list[str] = []
    init = TensorFile.__init__

    def counting(self: TensorFile, path: Path) -> None:
        names.append(path.name)
        init(self, path)

    monkeypatch.setattr(TensorFile, "__init__", counting)
    return names


def table_of(directory: Path) -> WeightsTable:
    with ShardedWeightsReader(directory) as reader:
        return reader.table()


@pytest.mark.parametrize("new", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("pipeline_size", "old"), [(1, 1), (1, 2), (2, 1), (2, 4), (1, 3)])
def test_slices_at_any_layout_are_those_of_the_merged_tensor(
    tmp_path: Path, pipeline_size: int, old: int, new: int
) -> None:
    write_grid(tmp_path / "w", pipeline_size=pipeline_size, tensor_size=old)
    table = table_of(tmp_path / "w")
    for rank in range(new):
        with WeightSlices(tmp_path / "w", table, tensor=Axis(size=new, rank=rank)) as slices:
            for name, full in full_weights().items():
                found = slices.read(name, SHARDINGS[name])
                expected = split(full, SHARDINGS[name], size=new, rank=rank)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected), name


def test_at_the_layout_that_wrote_it_a_rank_opens_its_own_file_once(
    tmp_path: Path, opened: list[str]
) -> None:
    write_grid(tmp_path / "w", pipeline_size=2, tensor_size=4)
    table = table_of(tmp_path / "w")
    for rank in range(4):
        opened.clear()
        with WeightSlices(tmp_path / "w", table, tensor=Axis(size=4, rank=rank)) as slices:
            for name, sharding in SHARDINGS.items():
                if name.startswith("block_1"):
                    slices.read(name, sharding)
        assert opened == [f"pp_01_tp_0{rank}.safetensors"]


def test_at_another_layout_a_rank_opens_the_files_of_its_slices(
    tmp_path: Path, opened: list[str]
) -> None:
    write_grid(tmp_path / "w", pipeline_size=1, tensor_size=4)
    table = table_of(tmp_path / "w")
    opened.clear()
    with WeightSlices(tmp_path / "w", table, tensor=Axis(size=2, rank=1)) as slices:
        for name in ("block_0.up.weight", "block_1.down.weight"):
            slices.read(name, SHARDINGS[name])
    assert opened == ["pp_00_tp_02.safetensors", "pp_00_tp_03.safetensors"]


def test_stacked_experts_are_cut_over_expert_ranks_too(tmp_path: Path) -> None:
    def shard(rank: int) -> Tensor:
        return split(full, sharding, size=2, rank=rank, expert=Axis(size=2, rank=1))

    full = torch.arange(4.0 * 3 * 6).view(4, 3, 6)
    sharding = Sharding(dim=2, full_size=6, experts=4)
    write_tensor(tmp_path / "w", full)
    for rank in range(2):
        with WeightSlices(
            tmp_path / "w", table_of(tmp_path / "w"), tensor=Axis(size=2, rank=rank)
        ) as slices:
            found = slices.read("w", sharding, expert=Axis(size=2, rank=1))
            assert torch.equal(found, shard(rank))
            more = Sharding(dim=2, full_size=6, experts=6)
            with _refused("'w'", value=[4, 3, 6], constraint="6 along", remedy="checkpoint"):
                slices.read("w", more, expert=Axis(size=2, rank=1))


def write_tensor(directory: Path, full: Tensor, sharding: Sharding = Sharding()) -> None:  # noqa: B008
    """A weight `w`, written by one rank."""
    directory.mkdir()
    weight = Weight("w", tuple(full.shape), full.dtype, sharding, lambda: full)
    with (directory / ShardPosition().file_name).open("wb") as file:
        write_shard(file, [weight], position=ShardPosition())


def test_what_does_not_fit_the_table_or_the_model_is_refused(tmp_path: Path) -> None:
    write_grid(tmp_path / "w", pipeline_size=1, tensor_size=2)
    table = table_of(tmp_path / "w")
    name, file = "block_0.up.weight", "pp_00_tp_00.safetensors"

    def read(table: WeightsTable, sharding: Sharding, name: str = name) -> None:
        with WeightSlices(tmp_path / "w", table, tensor=Axis(size=2)) as slices:
            slices.read(name, sharding)

    rows = SHARDINGS[name]
    with _refused("w", value="'nothing'", constraint="no weight", remedy="checkpoint"):
        read(table, rows, name="nothing")
    with _refused(name, value=[8, 3], constraint="9 along dimension 0", remedy="checkpoint"):
        read(table, Sharding(dim=0, full_size=9))
    for dim, size in ((0, 9), (0, None), (5, 8)):
        other = table._replace(places={name: WeightPlace(0, dim, size)})
        expected = f"{size} along dimension {dim}"
        with _refused(name, value="8 along dimension 0", constraint=expected, remedy="copy"):
            read(other, rows)
    elsewhere = table._replace(places={name: WeightPlace(1, 0, 8)})
    with _refused("pp_01_tp_00", value=name, constraint="cannot be read", remedy="copy"):
        read(elsewhere, rows)
    foreign = table._replace(places={"other": WeightPlace(0, 0, 8)})
    with _refused(file, value="other", constraint="cannot be read", remedy="copy"):
        read(foreign, rows, name="other")


def test_files_in_each_other_s_places_are_refused(tmp_path: Path) -> None:
    write_grid(tmp_path / "w", pipeline_size=1, tensor_size=2)
    table = table_of(tmp_path / "w")
    first, second = (tmp_path / "w" / f"pp_00_tp_0{rank}.safetensors" for rank in (0, 1))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with (
        WeightSlices(tmp_path / "w", table, tensor=Axis(size=2)) as slices,
        _refused(first.name, value="tensor_rank=1", constraint="tensor_rank=0", remedy="copy"),
    ):
        slices.read("block_0.up.weight", SHARDINGS["block_0.up.weight"])


def test_a_file_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    write_grid(tmp_path / "w", pipeline_size=1, tensor_size=1)
    table = table_of(tmp_path / "w")
    (file,) = (tmp_path / "w").iterdir()
    save_file({"block_0.up.weight": torch.zeros(8, 3)}, file)
    with (
        WeightSlices(tmp_path / "w", table, tensor=Axis()) as slices,
        _refused(file.name, value="no valid layout", constraint="manyformer", remedy="copy"),
    ):
        slices.read("block_0.up.weight", SHARDINGS["block_0.up.weight"])


@pytest.mark.parametrize(("dim", "size"), [(0, 9), (0, 0), (5, 8)])
def test_slices_that_cannot_make_what_is_declared_are_refused(dim, size, tmp_path: Path) -> None:
    write_tensor(tmp_path / "w", torch.zeros(8, 3), Sharding(dim=dim, full_size=size))
    table = WeightsTable(1, 1, {"w": WeightPlace(0, dim, size)})
    with (
        WeightSlices(tmp_path / "w", table, tensor=Axis()) as slices,
        _refused("'w'", value=[8, 3], constraint=f"{size} along dimension {dim}", remedy="copy"),
    ):
        slices.read("w", Sharding(dim=0, full_size=8))
