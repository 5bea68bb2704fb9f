"""Reader of the weights of a checkpoint written at any layout, one full tensor at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from parallel.checkpoint.errors import RESTORE
from parallel.checkpoint.manifest import MANIFEST_NAME, load_manifest, verify_content
from parallel.checkpoint.newest import newest_checkpoint
from parallel.checkpoint.tensor_file import TensorFile
from parallel.checkpoint.weight_slices import WeightPlace, WeightsTable
from parallel.checkpoint.weights import LAYOUT_KEY, ShardPosition, WeightsError, parse_layout
from parallel.sharding import Sharding, merge

_SHARD_NAME = re.compile(r"pp_(\d{2,4})_tp_(\d{2,4})\.safetensors")


class _Shard(NamedTuple):
    file: TensorFile
    position: ShardPosition
    shardings: dict[str, Sharding]

    @property
    def path(self) -> Path:
        return self.file.path


class ShardedWeightsReader:
    """Reader of a weights directory that merges the slices of tensor ranks, one tensor at a time.

    Args:
        path: a weights directory, a `step_N` directory or a run directory (its newest checkpoint).

    Raises:
        WeightsError: a missing, foreign or inconsistent shard; the message names the file.
    """

    def __init__(self, path: Path | str) -> None:
        self.directory = find_weights(Path(path))
        self._open_files = contextlib.ExitStack()
        try:
            shards = [self._open(file) for file in _shard_files(self.directory)]
            self._shards = _complete_grid(shards, self.directory)
            self._stage_of = _stage_of_names(self._shards)
        except BaseException:
            self._open_files.close()
            raise
        self.metadata = {k: v for k, v in shards[0].file.metadata.items() if k != LAYOUT_KEY}

    def __enter__(self) -> ShardedWeightsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def names(self) -> tuple[str, ...]:
        """Parameter names, first pipeline stage first."""
        return tuple(self._stage_of)

    def sharding(self, name: str) -> Sharding:
        return self._shards[self._stage(name)][0].shardings[name]

    def shape(self, name: str) -> torch.Size:
        """The shape of the full tensor, from the header alone."""
        shard = self._shards[self._stage(name)][0]
        shape = list(shard.file.shape(name))
        sharding = shard.shardings[name]
        if sharding.dim is not None:
            shape[sharding.dim] = sharding.extent
        return torch.Size(shape)

    def full(self, name: str) -> Tensor:
        """The full tensor, without padding rows.

        Raises:
            WeightsError: an unknown name, or slices that do not add up to the declared extent.
        """
        shards = self._shards[self._stage(name)]
        sharding = self.sharding(name)
        if sharding.dim is None:
            return shards[0].file.read(name)
        slices = [shard.file.read(name) for shard in shards]
        _check_slices(name, slices, sharding, shards)
        return merge(slices, sharding)

    def table(self) -> WeightsTable:
        """The files of every weight, for `WeightSlices` on other ranks."""
        places = {}
        for name, stage in self._stage_of.items():
            sharding = self.sharding(name)
            places[name] = WeightPlace(stage, sharding.dim, sharding.full_size)
        return WeightsTable(len(self._shards), len(self._shards[0]), places)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names():
            yield name, self.full(name)

    def _stage(self, name: str) -> int:
        if name not in self._stage_of:
            raise WeightsError(f"no weight {name!r} in {str(self.directory)!r}")
        return self._stage_of[name]

    def _open(self, path: Path) -> _Shard:
        try:
            file = self._open_files.enter_context(TensorFile(path))
            position, shardings = parse_layout(file.metadata[LAYOUT_KEY])
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{str(path)!r} is not a readable safetensors file ({error}); {RESTORE}"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{str(path)!r} was not written by manyformer: it records no valid layout; import "
                "a Hugging Face directory with python -m models.convert from-hf"
            ) from error
        if path.name != position.file_name or set(file.names()) != set(shardings):
            raise WeightsError(
                f"{str(path)!r} does not hold what its header says, {position}; {RESTORE}"
            )
        return _Shard(file, position, shardings)


def find_weights(path: Path) -> Path:
    """Find the weights directory for `path`: itself, a checkpoint's, or a run's newest one.

    Raises:
        WeightsError: there is none.
        CheckpointError: the run's record of rollbacks is damaged.
    """
    newest = newest_checkpoint(path)
    for candidate in [path, path / "weights", *([newest / "weights"] if newest else [])]:
        if any(_SHARD_NAME.fullmatch(entry.name) for entry in _entries(candidate)):
            return candidate
    raise WeightsError(
        f"no weights in {str(path.absolute())!r}: give a run directory, a checkpoint (step_N) or a "
        "directory of pp_XX_tp_XX.safetensors files"
    )


def verify_weights(directory: Path) -> None:
    """Verify the files against the checkpoint's manifest, if the directory belongs to one.

    Raises:
        CheckpointError: the manifest is damaged.
        WeightsError: the sha256 of a file differs; the message has both values.
    """
    path = directory.parent / MANIFEST_NAME
    if not path.is_file():
        return
    manifest = load_manifest(path)
    names = [f"{directory.name}/{shard.name}" for shard in _shard_files(directory)]
    if surplus := [name for name in names if name not in manifest.files]:
        raise WeightsError(
            f"{str(path)!r} is not of this checkpoint, which lacks {surplus[0]}; {RESTORE}"
        )
    if damage := verify_content(directory.parent, manifest, names):
        raise WeightsError(f"{damage}; {RESTORE}")


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _shard_files(directory: Path) -> list[Path]:
    return [entry for entry in _entries(directory) if _SHARD_NAME.fullmatch(entry.name)]


def _complete_grid(shards: Sequence[_Shard], directory: Path) -> list[list[_Shard]]:
    """Shards as [pipeline rank][tensor rank].

    Raises:
        WeightsError: missing or surplus files, or stages whose tensor ranks hold different names.
    """
    first = shards[0].position
    by_place = {(s.position.pipeline_rank, s.position.tensor_rank): s for s in shards}
    num_wanted = first.pipeline_size * first.tensor_size
    # Not a list: a damaged header may ask for more files than there is memory to name.
    missing = (
        ShardPosition(p, first.pipeline_size, t, first.tensor_size).file_name
        for p in range(first.pipeline_size)
        for t in range(first.tensor_size)
        if (p, t) not in by_place
    )
    if named := list(islice(missing, 5)):
        raise WeightsError(
            f"{str(directory)!r} lacks {', '.join(named)} ({num_wanted - len(shards)} files); "
            "copy the missing files from the original checkpoint, or use another one"
        )
    for shard in shards:
        if shard.position[1::2] != first[1::2] or len(shards) != num_wanted:
            raise WeightsError(
                f"{str(shard.path)!r} is of another layout than {str(shards[0].path)!r}; keep the "
                "files of one checkpoint only"
            )
    grid = [[by_place[p, t] for t in range(first.tensor_size)] for p in range(first.pipeline_size)]
    for stage in grid:
        for shard in stage:
            if shard.shardings != stage[0].shardings:
                raise WeightsError(
                    f"{str(shard.path)!r} and {str(stage[0].path)!r} hold different weights; keep "
                    "the files of one checkpoint only"
                )
    return grid


def _stage_of_names(grid: Sequence[Sequence[_Shard]]) -> dict[str, int]:
    stage_of: dict[str, int] = {}
    for stage, shards in enumerate(grid):
        for name in shards[0].shardings:
            if name in stage_of:
                raise WeightsError(
                    f"weight {name!r} is in pipeline stages {stage_of[name]} and {stage}; keep the "
                    "files of one checkpoint only"
                )
            stage_of[name] = stage
    return stage_of


def _check_slices(
    name: str, slices: Sequence[Tensor], sharding: Sharding, shards: Sequence[_Shard]
) -> None:
    for tensor, shard in zip(slices, shards, strict=True):
        if tensor.shape != slices[0].shape or tensor.dtype != slices[0].dtype:
            raise WeightsError(
                f"weight {name!r} is {tensor.dtype} {tuple(tensor.shape)} in {str(shard.path)!r}, "
                f"{slices[0].dtype} {tuple(slices[0].shape)} in {str(shards[0].path)!r}; keep the "
                "files of one checkpoint only"
            )
    dim, full_size = sharding.dim, sharding.full_size
    if dim is None or full_size is None or slices[0].dim() <= dim:
        raise WeightsError(
            f"weight {name!r} of shape {tuple(slices[0].shape)} cannot be {sharding}; {RESTORE}"
        )
    if slices[0].shape[dim] * len(slices) < full_size:
        raise WeightsError(
            f"weight {name!r} has {slices[0].shape[dim]} x {len(slices)} tensor ranks along "
            f"dimension {dim}, expected {full_size} or more; {RESTORE}"
        )
