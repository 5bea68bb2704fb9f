from __future__ import annotations

import hashlib
import io
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel.checkpoint.file_hashes import hash_files
from parallel.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, FileEntry, Layout, Manifest
from parallel.checkpoint.weights import (
    ShardPosition,
    Weight,
    WeightsError,
    module_weights,
    write_shard,
)
from parallel.checkpoint.weights_reader import ShardedWeightsReader, find_weights, verify_weights
from parallel.sharding import Sharding, split
from tests.refusals import assert_refused

SHARDINGS = {
    "embedding.weight": Sharding(dim=0, full_size=10),  # 10 rows over 4 ranks: padded to 12
    "block_0.up.weight": Sharding(dim=0, full_size=8),
    "block_0.norm.weight": Sharding(),
    "block_1.down.weight": Sharding(dim=1, full_size=8),
    "block_1.threshold": Sharding(),
}

_refused = partial(assert_refused, error=WeightsError)


def full_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "embedding.weight": normal(10, 3),
        "block_0.up.weight": normal(8, 3).bfloat16(),
        "block_0.norm.weight": normal(3).bfloat16(),  # an odd number of 2-byte items
        "block_1.down.weight": normal(3, 8),
        "block_1.threshold": torch.tensor(7, dtype=torch.int64),
    }


def weight(name: str, tensor: Tensor, sharding: Sharding) -> Weight:
    return Weight(name, tuple(tensor.shape), tensor.dtype, sharding, lambda: tensor)


def write_grid(directory: Path, *, pipeline_size: int, tensor_size: int) -> None:
    """The weights cut after `block_0` when there are two stages."""
    directory.mkdir(parents=True)
    for p in range(pipeline_size):
        for t in range(tensor_size):
            position = ShardPosition(p, pipeline_size, t, tensor_size)
            stage = [
                weight(
                    name, split(full, SHARDINGS[name], size=tensor_size, rank=t), SHARDINGS[name]
                )
                for name, full in full_weights().items()
                if pipeline_size == 1 or name.startswith("block_1") == bool(p)
            ]
            with (directory / position.file_name).open("wb") as file:
                write_shard(file, stage, position=position, metadata={"model": "{}"})


@pytest.mark.parametrize(("pipeline_size", "tensor_size"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_reader_merges_the_shards_of_every_layout_to_the_full_weights(
    tmp_path: Path, pipeline_size: int, tensor_size: int
) -> None:
    write_grid(tmp_path / "w", pipeline_size=pipeline_size, tensor_size=tensor_size)

    with ShardedWeightsReader(tmp_path / "w") as reader:
        merged = dict(reader.items())

        assert reader.names() == tuple(full_weights())
        assert reader.metadata == {"model": "{}"}
        assert reader.sharding("block_1.down.weight") == SHARDINGS["block_1.down.weight"]
    for name, expected in full_weights().items():
        assert merged[name].dtype == expected.dtype
        assert torch.equal(merged[name], expected), name


def test_written_shard_is_what_safetensors_itself_reads(tmp_path: Path) -> None:
    write_grid(tmp_path / "w", pipeline_size=1, tensor_size=1)

    loaded = load_file(tmp_path / "w" / "pp_00_tp_00.safetensors")

    assert set(loaded) == set(full_weights())
    assert all(torch.equal(loaded[name], full) for name, full in full_weights().items())


def test_writing_holds_one_tensor_at_a_time() -> None:
    alive = 0
    most = 0

    class Counted:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            self.tensor = torch.zeros(4)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def load() -> Tensor:
        counted = Counted()
        tensor = counted.tensor
        tensor.owner = counted  # type: ignore[attr-defined]
        del counted.tensor
        return tensor

    weights = [Weight(str(i), (4,), torch.float32, Sharding(), load) for i in range(5)]
    write_shard(io.BytesIO(), weights, position=ShardPosition())

    assert most <= 2  # the one just loaded, and the one before it until its name is rebound


def test_module_weights_writes_shared_parameters_once_and_keeps_buffers() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(4, 3)
    model.head = nn.Linear(3, 4, bias=False)
    model.head.weight = model.embedding.weight
    model.embedding.weight.sharding = Sharding(dim=0, full_size=4)  # type: ignore[attr-defined]
    model.register_buffer("threshold", torch.tensor(0.5))
    model.register_buffer("cache", torch.zeros(9), persistent=False)

    weights = {w.name: w for w in module_weights(model, read=lambda tensor: tensor + 1)}

    assert set(weights) == {"threshold", "embedding.weight"}
    assert weights["embedding.weight"].sharding == Sharding(dim=0, full_size=4)
    assert weights["threshold"].sharding == Sharding()
    assert torch.equal(weights["embedding.weight"].load(), model.embedding.weight + 1)
    assert [w.name for w in module_weights(model, skip={"threshold"})] == ["embedding.weight"]


def test_module_weights_refuses_a_parameter_that_declares_no_sharding() -> None:
    with assert_refused(
        "parameter weight", value=(2, 2), constraint="sharding", remedy="declare_replicated"
    ):
        module_weights(nn.Linear(2, 2))


def test_a_failed_write_still_takes_part_in_the_loads_of_the_other_ranks() -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    loaded: list[int] = []

    def weights() -> list[Weight]:
        def load(i: int) -> Tensor:
            loaded.append(i)
            return torch.zeros(2)

        return [
            Weight(str(i), (2,), torch.float32, Sharding(), lambda i=i: load(i)) for i in range(3)
        ]

    with pytest.raises(OSError, match="No space left"):
        write_shard(FullDisk(), weights(), position=ShardPosition())
    write_shard(None, weights(), position=ShardPosition())

    assert loaded == [0, 1, 2, 0, 1, 2]


def test_a_tensor_that_differs_from_its_declaration_is_refused() -> None:
    wrong = Weight("w", (3,), torch.float32, Sharding(), lambda: torch.zeros(4))

    with assert_refused(
        "'w'", value=(4,), constraint="torch.float32 (3,)", remedy="declaration", error=WeightsError
    ):
        write_shard(io.BytesIO(), [wrong], position=ShardPosition())


def test_reader_names_missing_shards(tmp_path: Path) -> None:
    write_grid(tmp_path / "w", pipeline_size=2, tensor_size=2)
    (tmp_path / "w" / "pp_01_tp_01.safetensors").unlink()

    with _refused(str(tmp_path), value="pp_01_tp_01.safetensors", constraint="1", remedy="copy"):
        ShardedWeightsReader(tmp_path / "w")


def test_reader_refuses_a_shard_of_another_grid_or_under_a_wrong_name(tmp_path: Path) -> None:
    write_grid(tmp_path / "w", pipeline_size=1, tensor_size=2)
    write_grid(tmp_path / "other", pipeline_size=2, tensor_size=4)
    name = "pp_00_tp_01.safetensors"
    original = (tmp_path / "w" / name).read_bytes()

    (tmp_path / "w" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    first = "pp_00_tp_00.safetensors"
    with _refused(name, value=first, constraint="layout", remedy="one checkpoint"):
        ShardedWeightsReader(tmp_path / "w")
    (tmp_path / "w" / name).write_bytes((tmp_path / "w" / "pp_00_tp_00.safetensors").read_bytes())
    with _refused(name, value="tensor_rank=0", constraint="header", remedy="copy"):
        ShardedWeightsReader(tmp_path / "w")
    (tmp_path / "w" / name).write_bytes(original)
    ShardedWeightsReader(tmp_path / "w")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_reader_refuses_a_truncated_shard(tmp_path: Path, keep: int) -> None:
    write_grid(tmp_path / "w", pipeline_size=1, tensor_size=1)
    path = tmp_path / "w" / "pp_00_tp_00.safetensors"
    path.write_bytes(path.read_bytes()[:keep])

    with _refused(str(path.parent), value=path.name, constraint="safetensors", remedy="copy"):
        ShardedWeightsReader(tmp_path / "w")


def test_reader_refuses_slices_that_do_not_add_up(tmp_path: Path) -> None:
    position = ShardPosition()
    short = weight("w", torch.zeros(3, 2), Sharding(dim=0, full_size=4))
    (tmp_path / "w").mkdir()
    with (tmp_path / "w" / position.file_name).open("wb") as file:
        write_shard(file, [short], position=position)

    with (
        ShardedWeightsReader(tmp_path / "w") as reader,
        _refused("'w'", value="3 x 1", constraint=("dimension 0", "4"), remedy="copy"),
    ):
        reader.full("w")


def test_weights_are_found_from_a_run_a_checkpoint_or_their_own_directory(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (9, 10, 11):
        write_grid(checkpoints / f"step_{step}" / "weights", pipeline_size=1, tensor_size=1)
    for step in (9, 10):  # step 11 was not completed
        (checkpoints / f"step_{step}" / "manifest.json").write_text("{}")
    newest = checkpoints / "step_10" / "weights"

    assert find_weights(newest) == newest
    assert find_weights(newest.parent) == newest
    assert find_weights(tmp_path / "run") == newest
    with _refused("weights", value=tmp_path, constraint="no weights", remedy="run directory"):
        find_weights(tmp_path)


def test_verification_finds_a_flipped_bit_through_the_manifest(tmp_path: Path) -> None:
    weights = tmp_path / "step_1" / "weights"
    write_grid(weights, pipeline_size=1, tensor_size=1)
    path = weights / "pp_00_tp_00.safetensors"
    [(_, record, _)] = hash_files([path])
    entry = FileEntry(**record._asdict(), rank=0)
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        step=1,
        layout=Layout(),
        config={},
        fingerprints={},
        versions={},
        sharding={},
        files={"weights/pp_00_tp_00.safetensors": entry},
    )
    (tmp_path / "step_1" / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    verify_weights(weights)

    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 4
    path.write_bytes(damaged)

    found = hashlib.sha256(damaged).hexdigest()
    with _refused(path.name, value=found, constraint=entry.sha256, remedy="copy"):
        verify_weights(weights)
