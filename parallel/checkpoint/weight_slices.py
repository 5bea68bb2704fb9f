"""One tensor rank's slices of stored weights, read from the files that hold them and no others."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from parallel.checkpoint.errors import RESTORE
from parallel.checkpoint.tensor_file import TensorFile
from parallel.checkpoint.weights import LAYOUT_KEY, ShardPosition, WeightsError, parse_layout
from parallel.context import Axis
from parallel.sharding import Sharding, local_extent


class WeightPlace(NamedTuple):
    """The pipeline stage of a weight, and its sharding over the tensor ranks of that stage."""

    stage: int
    dim: int | None
    full_size: int | None


class WeightsTable(NamedTuple):
    """The files of every weight in a weights directory."""

    pipeline_size: int
    tensor_size: int
    places: dict[str, WeightPlace]


class WeightSlices:
    """Reader of the slices of one tensor rank, at any layout.

    A file is opened when something in it is needed, once, and stays open until `close`. At the
    layout that wrote the weights this is the rank's own file.

    Args:
        table: of the directory's files, from `ShardedWeightsReader.table` or a checkpoint's index.
        tensor: size of the tensor axis and this rank's place on it.
    """

    def __init__(self, directory: Path, table: WeightsTable, *, tensor: Axis) -> None:
        self.directory = directory
        self._table, self._tensor = table, tensor
        self._files: dict[tuple[int, int], _File] = {}
        self._open_files = contextlib.ExitStack()

    def __enter__(self) -> WeightSlices:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._open_files.close()
        self._files = {}

    def read(self, name: str, sharding: Sharding, *, expert: Axis | None = None) -> Tensor:
        """This rank's slice of a weight, cut as `sharding` declares, padded with zeros.

        With `expert`, a parameter that stacks experts is also cut over expert ranks.

        Raises:
            WeightsError: an unknown name, a file that does not hold what the table says, or a
                tensor that does not have the size that `sharding` declares.
        """
        cut = None
        if sharding.dim is not None:
            cut = local_extent(sharding.extent, size=self._tensor.size, rank=self._tensor.rank)
        stored = self._find(name, near=cut.start if cut else 0)
        wanted = [(0, size) for size in stored.shape]
        if expert is not None and sharding.experts is not None:
            self._check_size(stored, 0, sharding.experts)
            each = sharding.experts // expert.size
            wanted[0] = (expert.rank * each, (expert.rank + 1) * each)
        if cut is None or sharding.dim is None:
            return self._read(stored, wanted)
        self._check_size(stored, sharding.dim, sharding.extent)
        wanted[sharding.dim] = (cut.start, cut.stop)
        found = self._read(stored, wanted)
        if cut.stop - cut.start == cut.padded:
            return found
        padding = list(found.shape)
        padding[sharding.dim] = cut.padded - (cut.stop - cut.start)
        return torch.cat([found, found.new_zeros(padding)], dim=sharding.dim)

    def _check_size(self, stored: _Stored, dim: int, size: int) -> None:
        if stored.shape[dim : dim + 1] != (size,):
            raise WeightsError(
                f"{str(self.directory)!r}: weight {stored.name!r} has shape {list(stored.shape)}, "
                f"the model declares {size} along dimension {dim}: it is of another model; use a "
                "checkpoint of this one"
            )

    def _find(self, name: str, *, near: int) -> _Stored:
        """Look a weight up in the file that should hold index `near` of the dimension it is cut
        along, which is needed anyway."""
        place, num_slices = self._table.places.get(name), self._table.tensor_size
        if place is None:
            raise WeightsError(
                f"no weight {name!r} in {str(self.directory)!r}: it is of another model; use a "
                "checkpoint of this one"
            )
        if place.dim is None:
            rank = self._tensor.rank % num_slices
            return _Stored(name, place, self._shape(name, place, rank), 0, rank)
        size = place.full_size or 0
        usual = max(1, -(-size // num_slices))
        rank = min(near // usual, num_slices - 1)
        shape = list(self._shape(name, place, rank))
        width = shape[place.dim] if place.dim < len(shape) else 0
        if not 0 < size <= width * num_slices:
            raise WeightsError(
                f"{str(self.directory)!r}: weight {name!r} has slices of shape {shape} on "
                f"{num_slices} tensor ranks, expected {place.full_size} along dimension "
                f"{place.dim}; {RESTORE}"
            )
        shape[place.dim] = size
        return _Stored(name, place, tuple(shape), width, rank)

    def _read(self, stored: _Stored, wanted: list[tuple[int, int]]) -> Tensor:
        """The elements of the full tensor in `wanted`, a range for each dimension."""
        dim, width = stored.place.dim, stored.width
        if dim is None:
            return self._part(stored, stored.rank, wanted)
        low, high = wanted[dim]
        if low == high:  # padding alone
            return self._part(stored, stored.rank, [*wanted[:dim], (0, 0), *wanted[dim + 1 :]])
        parts = []
        for rank in range(low // width, -(-high // width)):
            start, stop = (min(max(index - rank * width, 0), width) for index in (low, high))
            ranges = [*wanted[:dim], (start, stop), *wanted[dim + 1 :]]
            parts.append(self._part(stored, rank, ranges))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

    def _part(self, stored: _Stored, rank: int, ranges: list[tuple[int, int]]) -> Tensor:
        file = self._file(stored.name, stored.place, rank)
        try:
            part = file.read(stored.name, *ranges)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file.path, stored.name, error) from error
        if part.shape != torch.Size(stop - start for start, stop in ranges):
            raise WeightsError(
                f"{str(file.path)!r}: weight {stored.name!r} is smaller than in the other files; "
                "keep the files of one checkpoint only"
            )
        return part

    def _shape(self, name: str, place: WeightPlace, rank: int) -> tuple[int, ...]:
        file = self._file(name, place, rank)
        try:
            return file.shape(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file.path, name, error) from error

    def _file(self, name: str, place: WeightPlace, rank: int) -> TensorFile:
        """The file that should hold a weight, checked that it says so itself."""
        if (place.stage, rank) not in self._files:
            self._files[place.stage, rank] = self._open(name, place.stage, rank)
        file, shardings = self._files[place.stage, rank]
        found = shardings.get(name, place)
        if (found.dim, found.full_size) != (place.dim, place.full_size):
            raise WeightsError(
                f"{str(file.path)!r}: weight {name!r} has {found.full_size} along dimension "
                f"{found.dim}, expected {place.full_size} along dimension {place.dim}; {RESTORE}"
            )
        return file

    def _open(self, name: str, stage: int, rank: int) -> _File:
        expected = ShardPosition(stage, self._table.pipeline_size, rank, self._table.tensor_size)
        path = self.directory / expected.file_name
        try:
            file = self._open_files.enter_context(TensorFile(path))
            position, shardings = parse_layout(file.metadata[LAYOUT_KEY])
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, name, error) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{str(path)!r} records no valid layout, so it was not written by manyformer; "
                f"{RESTORE}"
            ) from error
        if position != expected:
            raise WeightsError(
                f"{str(path)!r} says that it is {position}, expected {expected}; {RESTORE}"
            )
        return _File(file, shardings)


class _File(NamedTuple):
    """An open file, and what it says of itself."""

    file: TensorFile
    shardings: dict[str, Sharding]


class _Stored(NamedTuple):
    """A weight in the files: the shape of the full tensor, the extent of a slice along the
    dimension that is cut, and the tensor rank whose file has been looked at."""

    name: str
    place: WeightPlace
    shape: tuple[int, ...]
    width: int
    rank: int


def _unreadable(path: Path, name: str, error: Exception) -> WeightsError:
    return WeightsError(f"{str(path)!r}, {name}: cannot be read ({error}); {RESTORE}")
