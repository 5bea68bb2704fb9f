"""Layout-independent optimizer state: named flat ranges of elements, without pickles.

`optimizer/rank_00000.safetensors` ... hold, for the elements of each parameter that the rank
updates, `NAME/master`, `NAME/exp_avg` and `NAME/exp_avg_sq` as fp32 vectors. The header records
which elements of which tensor rank's slice they are, and their step count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.checkpoint.errors import RESTORE, CheckpointError
from parallel.checkpoint.weights import Weight
from parallel.context import Axis
from parallel.sharding import Sharding, merge, split

FOLDER = "optimizer"
HEADER = "manyformer_optimizer"
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
_FILES_KEPT_OPEN = 16


def shard_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


class FlatRange(BaseModel):
    """Elements [start, start + length) of the slice `shard` of `num_shards`, flattened."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: tuple[int, ...]
    dim: int | None
    full_size: int | None
    shard: int
    num_shards: int
    start: int
    length: int
    step: int

    @property
    def layout(self) -> tuple[object, ...]:
        """The fields that are equal in all ranges of a parameter."""
        return self.shape, self.dim, self.full_size, self.num_shards


class OptimizerShard(NamedTuple):
    """One rank's part of the optimizer state: its elements, and the header that names them.

    `weights`: the elements as forward reads them, by parameter, if that tensor is not the master
    itself. Not written; `check_masters` compares them.
    """

    elements: Sequence[Weight]
    weights: Sequence[Weight]
    metadata: Mapping[str, str]


def check_masters(shard: OptimizerShard) -> None:
    """Check that every weight is its fp32 master rounded.

    Raises:
        CheckpointError: a weight is not; a run cannot continue from such a checkpoint.
    """
    weights = {weight.name: weight for weight in shard.weights}
    for element in shard.elements:
        name, _, key = element.name.rpartition("/")
        if key != MASTER:
            continue
        master = element.load()
        weight = weights[name].load() if name in weights else master
        if not torch.equal(master.to(weight), weight):  # NaN is unequal to itself
            raise CheckpointError(
                f"parameter {name!r}: the weights differ from their fp32 master, or are NaN, in "
                f"the {len(master)} elements that this rank updates; resume from the last "
                "checkpoint"
            )


_OpenFile = Callable[[Path], Any]  # -> safetensors' handle


class _Piece(NamedTuple):
    path: Path
    span: FlatRange

    @property
    def stop(self) -> int:
        return self.span.start + self.span.length


class StoredParameter(NamedTuple):
    """One parameter of a checkpoint: its slices, each a list of pieces."""

    name: str
    sharding: Sharding
    shard_shape: tuple[int, ...]
    shards: list[list[_Piece]]
    open_file: _OpenFile

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        shape = list(self.shard_shape)
        if self.sharding.dim is not None:
            shape[self.sharding.dim] = self.sharding.extent
        return tuple(shape)


class StoredOptimizer:
    """The optimizer state of a checkpoint; a rank reads only the elements it will update.

    Raises:
        CheckpointError: a foreign file, or a parameter with missing or duplicate elements; the
            message names it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Opening a file parses its header, which names every tensor: files are kept open.
        open_file = lru_cache(_FILES_KEPT_OPEN)(partial(safe_open, framework="pt"))
        pieces: dict[str, list[_Piece]] = {}
        for path in sorted(directory.iterdir()):
            for name, span in _read_ranges(path).items():
                pieces.setdefault(name, []).append(_Piece(path, span))
        self._parameters = {name: _assemble(name, each, open_file) for name, each in pieces.items()}

    def names(self) -> set[str]:
        return set(self._parameters)

    def parameter(self, name: str) -> StoredParameter:
        """The stored slices of a parameter.

        Raises:
            CheckpointError: there are none.
        """
        if name not in self._parameters:
            raise CheckpointError(
                f"{str(self.directory)!r} has no state of parameter {name!r}: the checkpoint is of "
                "another model; resume with the configuration that wrote it"
            )
        return self._parameters[name]

    def steps(self, name: str) -> set[int]:
        """Step counts of the elements of a parameter: one, unless something went wrong."""
        shards = self.parameter(name).shards
        return {piece.span.step for shard in shards for piece in shard}

    def read(self, name: str, key: str, *, start: int, length: int, tensor: Axis) -> Tensor:
        """Elements [start, start + length) of the slice that `tensor.rank` of `tensor.size` holds.

        The slice is flattened; elements of padding rows are zero. Only the rows of the full tensor
        that these elements lie in are read.
        """
        stored = self.parameter(name)
        width = _row_width(_slice_shape(stored, tensor))
        first, last = start // width, -(-(start + length) // width)
        rows = _slice_rows(stored, key, first, last, tensor)
        return rows.reshape(-1).narrow(0, start - first * width, length)


def _slice_shape(stored: StoredParameter, tensor: Axis) -> tuple[int, ...]:
    shape = list(stored.shape)
    if stored.sharding.dim is not None:
        shape[stored.sharding.dim] = -(-stored.sharding.extent // tensor.size)
    return tuple(shape)


def _slice_rows(stored: StoredParameter, key: str, first: int, last: int, tensor: Axis) -> Tensor:
    """Rows [first, last) of a tensor rank's slice; a row is an index of the first dimension."""
    sharding = stored.sharding
    if sharding.dim != 0:
        rows = _full_rows(stored, key, first, last)
        return split(rows, sharding, size=tensor.size, rank=tensor.rank)
    before = tensor.rank * _slice_shape(stored, tensor)[0]
    start, stop = (min(before + row, sharding.extent) for row in (first, last))
    rows = _full_rows(stored, key, start, stop)
    padding = rows.new_zeros((last - first) - (stop - start), *rows.shape[1:])
    return torch.cat([rows, padding])


def _full_rows(stored: StoredParameter, key: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the full tensor, from the slices that hold a part of them."""
    sharding, shape = stored.sharding, stored.shard_shape
    width = _row_width(shape)

    def rows(shard: int, low: int, high: int) -> Tensor:
        elements = _elements(stored, key, shard, low * width, high * width)
        return elements.view(high - low, *shape[1:])

    if sharding.dim is None:
        return rows(0, start, stop)
    if sharding.dim > 0:
        return merge([rows(i, start, stop) for i in range(len(stored.shards))], sharding)
    parts = [torch.empty(0, *shape[1:])]
    for i in range(len(stored.shards)):
        low, high = (min(max(row - i * shape[0], 0), shape[0]) for row in (start, stop))
        parts.append(rows(i, low, high))
    return torch.cat(parts)


def _elements(stored: StoredParameter, key: str, shard: int, start: int, stop: int) -> Tensor:
    """Elements of one slice, flattened, from the pieces that overlap them."""
    parts = [torch.empty(0)]
    for piece in stored.shards[shard]:
        low, high = max(start, piece.span.start), min(stop, piece.stop)
        if low < high:
            tensor = f"{stored.name}/{key}"
            low, high = low - piece.span.start, high - piece.span.start
            parts.append(_read_piece(stored.open_file, piece, tensor, low, high))
    return torch.cat(parts)


def _read_piece(open_file: _OpenFile, piece: _Piece, tensor: str, low: int, high: int) -> Tensor:
    try:
        view = open_file(piece.path).get_slice(tensor)
        if view.get_shape() == [piece.span.length] and view.get_dtype() == "F32":
            elements: Tensor = view[low:high]
            return elements
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(piece.path)!r}, {tensor}: cannot be read ({error}); {RESTORE}"
        ) from error
    raise CheckpointError(
        f"{str(piece.path)!r}, {tensor}: {view.get_dtype()} {view.get_shape()}, expected "
        f"F32 [{piece.span.length}], so the file was not written by manyformer; {RESTORE}"
    )


def _row_width(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _read_ranges(path: Path) -> dict[str, FlatRange]:
    """Read the header of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            table = json.loads((file.metadata() or {})[HEADER])
        return {
            name: FlatRange.model_validate_json(json.dumps(span)) for name, span in table.items()
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); {RESTORE}") from error
    except (KeyError, ValueError, AttributeError, ValidationError) as error:
        raise CheckpointError(
            f"{str(path)!r} has no valid header {HEADER!r}, so it was not written by manyformer; "
            f"{RESTORE}"
        ) from error


def _assemble(name: str, pieces: Iterable[_Piece], open_file: _OpenFile) -> StoredParameter:
    """Order the pieces of a parameter and check that every element exists exactly once.

    Raises:
        CheckpointError: names the parameter and the file where a gap or an overlap begins.
    """
    pieces = sorted(pieces, key=lambda piece: (piece.span.shard, piece.span.start))
    first = pieces[0].span
    sharding = Sharding(dim=first.dim, full_size=first.full_size)
    num_shards = first.num_shards if sharding.dim is not None else 1
    shards: list[list[_Piece]] = [[] for _ in range(num_shards)]
    for piece in pieces:
        if piece.span.layout != first.layout or piece.span.shard >= num_shards:
            raise CheckpointError(
                f"{str(piece.path)!r}: parameter {name!r} is {piece.span.layout}, "
                f"{first.layout} in {str(pieces[0].path)!r}; keep the files of one checkpoint only"
            )
        shards[piece.span.shard].append(piece)
    for number, shard in enumerate(shards):
        _check_tiling(name, number, shard, math.prod(first.shape))
    return StoredParameter(name, sharding, first.shape, shards, open_file)


def _check_tiling(name: str, number: int, shard: list[_Piece], numel: int) -> None:
    position = 0
    for start, stop, path in [
        *((p.span.start, p.stop, str(p.path)) for p in shard),
        (numel, 0, ""),
    ]:
        if start != position:
            where = f" before {path!r}" if path else ""
            raise CheckpointError(
                f"parameter {name!r}, slice {number}: optimizer state of elements {position} to "
                f"{start} is missing or duplicate{where}, expected 0 to {numel} once each; "
                f"{RESTORE}"
            )
        position = stop
