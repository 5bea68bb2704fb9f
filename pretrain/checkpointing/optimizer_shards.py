"""Layout-independent optimizer state: named flat ranges of elements, without pickles.

`optimizer/rank_00000.safetensors` ... hold, for the elements of each parameter that the rank
updates, `NAME/master`, `NAME/exp_avg` and `NAME/exp_avg_sq` as fp32 vectors. The header records
which elements of which tensor rank's slice they are, and their step count; the index of the
checkpoint (`index.py`) says the same of all files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from parallel.checkpoint.errors import RESTORE, CheckpointError
from parallel.checkpoint.tensor_file import TensorFile
from parallel.checkpoint.weights import Weight
from parallel.context import Axis
from parallel.sharding import Sharding
from pretrain.checkpointing.index import (
    HEADER,
    FlatRange,
    ParameterEntry,
    collect_optimizer,
    file_header,
    shard_name,
)

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerShard(NamedTuple):
    """One rank's part of the optimizer state: its elements, and by parameter which ones they are.

    `weights`: the elements as forward reads them, by parameter, if that tensor is not the master
    itself. Not written; `check_masters` compares them.
    """

    elements: Sequence[Weight]
    weights: Sequence[Weight]
    ranges: Mapping[str, FlatRange]

    @property
    def metadata(self) -> dict[str, str]:
        """The header of its file."""
        ranges = {name: span.model_dump(mode="json") for name, span in self.ranges.items()}
        return {HEADER: json.dumps(ranges)}


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


class Piece(NamedTuple):
    """Elements [start, start + length) of slice `shard`, flattened, in the file of `rank`."""

    rank: int
    shard: int
    start: int
    length: int
    step: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class StoredParameter(NamedTuple):
    """One parameter of a checkpoint: its slices, each a list of pieces in order."""

    name: str
    sharding: Sharding
    shard_shape: tuple[int, ...]
    shards: list[list[Piece]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return _with_size(self.shard_shape, self.sharding, self.sharding.full_size)

    def slice_shape(self, num_slices: int) -> tuple[int, ...]:
        """Shape of each of `num_slices` slices, the last of them with padding."""
        size = -(-(self.sharding.full_size or 0) // num_slices)
        return _with_size(self.shard_shape, self.sharding, size)


def _with_size(shape: tuple[int, ...], sharding: Sharding, size: int | None) -> tuple[int, ...]:
    if sharding.dim is None or size is None:
        return shape
    return (*shape[: sharding.dim], size, *shape[sharding.dim + 1 :])


class Wanted(NamedTuple):
    """Elements from `start` on of this tensor rank's slice of a parameter, flattened.

    `into`: key (`MASTER`, ...) -> the vector that they are read into; elements of padding are zero.
    """

    name: str
    start: int
    into: Mapping[str, Tensor]

    @property
    def stop(self) -> int:
        return self.start + next(iter(self.into.values())).numel()


class _Copy(NamedTuple):
    """A block of equal rows: where it begins in a stored vector and in the one it is read into,
    and how far apart its rows are in each."""

    name: str
    key: str
    piece: Piece
    source: int
    source_stride: int
    target: int
    target_stride: int
    rows: int
    columns: int
    into: Tensor


class StoredOptimizer:
    """The optimizer state of a checkpoint; a rank opens only the files that it needs, once each.

    Args:
        directory: `optimizer/` of the checkpoint.
        entries: the optimizer section of its index; None: collected from the header of every file.

    Raises:
        CheckpointError: here and in every method: a foreign file, or a parameter with missing or
            duplicate elements; the message names it.
    """

    def __init__(
        self, directory: Path, entries: Mapping[str, ParameterEntry] | None = None
    ) -> None:
        self.directory = directory
        self._entries = collect_optimizer(directory) if entries is None else entries
        self._parameters: dict[str, StoredParameter] = {}

    def names(self) -> set[str]:
        return set(self._entries)

    def check(self) -> None:
        """Check that the pieces of every parameter hold each element once."""
        for name in self._entries:
            self.parameter(name)

    def parameter(self, name: str) -> StoredParameter:
        """The stored slices of a parameter.

        Raises:
            CheckpointError: there are none.
        """
        if name not in self._entries:
            raise CheckpointError(
                f"{str(self.directory)!r} has no state of parameter {name!r}: the checkpoint is of "
                "another model; resume with the configuration that wrote it"
            )
        if name not in self._parameters:
            self._parameters[name] = _assemble(name, self._entries[name], self.directory)
        return self._parameters[name]

    def steps(self, name: str) -> set[int]:
        """Step counts of the elements of a parameter: one, unless something went wrong."""
        return {piece.step for shard in self.parameter(name).shards for piece in shard}

    def read(
        self, wanted: Sequence[Wanted], *, tensor: Axis, progress: Callable[[str], object]
    ) -> None:
        """Read elements of the slices that `tensor.rank` of `tensor.size` holds, file by file.

        `progress` is called with the name of each file before it is read.
        """
        copies = self.plan(wanted, tensor=tensor)
        for rank in sorted(copies):
            path = self.directory / shard_name(rank)
            progress(path.name)
            self._read_file(path, copies[rank])

    def plan(self, wanted: Sequence[Wanted], *, tensor: Axis) -> dict[int, list[_Copy]]:
        """The parts to copy from the file of each rank; padding is zeroed here."""
        copies: dict[int, list[_Copy]] = {}
        for each in wanted:
            for rank, copy in self._copies(each, tensor):
                copies.setdefault(rank, []).append(copy)
        return copies

    def full(self) -> dict[str, dict[str, Tensor]]:
        """Every parameter, merged: key -> name -> the full tensor."""
        found: dict[str, dict[str, Tensor]] = {key: {} for key in (MASTER, *MOMENTS)}
        wanted = []
        for name in sorted(self.names()):
            shape = self.parameter(name).shape
            for key in found:
                found[key][name] = torch.empty(shape)
            wanted.append(Wanted(name, 0, {key: found[key][name].view(-1) for key in found}))
        self.read(wanted, tensor=Axis(), progress=str)
        return found

    def _read_file(self, path: Path, copies: Sequence[_Copy]) -> None:
        try:
            with TensorFile(path) as file:
                self._check_header(file, copies)
                for copy in copies:
                    _read(file, copy)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read ({error}); {RESTORE}") from error

    def _check_header(self, file: TensorFile, copies: Sequence[_Copy]) -> None:
        """Check that a file says of itself what the index says of it: files may be in each other's
        places, or the index be another checkpoint's."""
        # Not validated: the file of a rank with thousands of experts has as many entries.
        header = file_header(file, json.loads)
        for name, piece in dict.fromkeys((copy.name, copy.piece) for copy in copies):
            expected = self._entries[name].span(*piece[1:]).model_dump(mode="json")
            found = header.get(name) if isinstance(header, dict) else None
            if found != expected:
                raise CheckpointError(
                    f"{str(file.path)!r} holds of parameter {name!r} {found or 'nothing'}, in the "
                    f"index it is {expected}; {RESTORE}"
                )

    def _copies(self, wanted: Wanted, tensor: Axis) -> Iterator[tuple[int, _Copy]]:
        stored = self.parameter(wanted.name)
        new = _grid(stored.slice_shape(tensor.size), stored.sharding, tensor.rank)
        limit = _grid(stored.shape, stored.sharding, 0).width
        if new.end > limit:  # padding, which is in no file
            for vector in wanted.into.values():
                vector.zero_()
        for shard, pieces in enumerate(stored.shards):
            old = _grid(stored.shard_shape, stored.sharding, shard)
            low, high = max(old.first, new.first), min(old.end, new.end, limit)
            for piece in pieces if low < high else ():
                spans = (old, piece.start, piece.stop), (new, wanted.start, wanted.stop)
                for row, rows, first, last in _blocks(*spans, low=low, high=high):
                    for key, vector in wanted.into.items():
                        copy = _Copy(
                            name=wanted.name,
                            key=key,
                            piece=piece,
                            source=row * old.width + first - old.first - piece.start,
                            source_stride=old.width,
                            target=row * new.width + first - new.first - wanted.start,
                            target_stride=new.width,
                            rows=rows,
                            columns=last - first,
                            into=vector,
                        )
                        yield piece.rank, copy


class _Grid(NamedTuple):
    """A flattened slice as rows of `width` elements, cut so that slices lie side by side: a row
    holds elements [first, first + width) of a row of the full tensor."""

    width: int
    first: int

    @property
    def end(self) -> int:
        return self.first + self.width


def _grid(shape: tuple[int, ...], sharding: Sharding, shard: int) -> _Grid:
    if sharding.dim is None:
        return _Grid(math.prod(shape), 0)
    width = math.prod(shape[sharding.dim :])
    return _Grid(width, shard * width)


_Span = tuple[_Grid, int, int]  # elements [start, stop) of a flattened slice


def _blocks(*spans: _Span, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
    """The common part of the spans in the columns [low, high) of the full tensor's rows.

    Yields (first row, number of rows, first column, end of the columns). A span may begin and end
    within a row, so the first and the last row are blocks of their own.
    """
    if any(start >= stop for _, start, stop in spans):
        return
    top = max(start // grid.width for grid, start, _ in spans)
    bottom = min((stop - 1) // grid.width for grid, _, stop in spans)
    for row, end in ((top, top + 1), (top + 1, bottom), (max(bottom, top + 1), bottom + 1)):
        first = max(low, *(grid.first + start - row * grid.width for grid, start, _ in spans))
        last = min(high, *(grid.first + stop - row * grid.width for grid, _, stop in spans))
        if row < end <= bottom + 1 and first < last:
            yield row, end - row, first, last


def _read(file: TensorFile, copy: _Copy) -> None:
    tensor, length = f"{copy.name}/{copy.key}", copy.piece.length
    shape, dtype = file.shape(tensor), file.dtype(tensor)
    if (shape, dtype) != ((length,), "F32"):
        raise CheckpointError(
            f"{str(file.path)!r}, {tensor}: {dtype} {list(shape)}, expected F32 [{length}], so the "
            f"file was not written by manyformer; {RESTORE}"
        )
    end = copy.source + (copy.rows - 1) * copy.source_stride + copy.columns
    found, size = file.read(tensor, (copy.source, end)), (copy.rows, copy.columns)
    place = copy.into.storage_offset() + copy.target
    into = copy.into.as_strided(size, (copy.target_stride, 1), place)
    into.copy_(found.as_strided(size, (copy.source_stride, 1), found.storage_offset()))


def _assemble(name: str, entry: ParameterEntry, directory: Path) -> StoredParameter:
    """Order the pieces of a parameter and check that every element exists exactly once.

    Raises:
        CheckpointError: names the parameter and the file where a gap or an overlap begins.
    """
    sharding = Sharding(entry.dim, entry.full_size)
    num_shards, numel = entry.num_shards if entry.dim is not None else 1, math.prod(entry.shape)
    pieces = sorted((Piece(*piece) for piece in entry.pieces), key=lambda p: (p.shard, p.start))
    if pieces and pieces[-1].shard >= num_shards:
        raise CheckpointError(
            f"{str(directory / shard_name(pieces[-1].rank))!r}: parameter {name!r} has slice "
            f"{pieces[-1].shard}, numbered from 0, of {num_shards}; keep the files of one "
            "checkpoint only"
        )
    if sharding.dim is not None and not _is_cut(entry):
        raise CheckpointError(
            f"{str(directory)!r}: parameter {name!r} has {num_shards} slices of shape "
            f"{list(entry.shape)}, expected {entry.full_size} along dimension {entry.dim}; "
            f"{RESTORE}"
        )
    by_shard: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_shard.setdefault(piece.shard, []).append(piece)
    for number in range(num_shards):  # the first that is missing ends it, however many there are
        _check_tiling(name, number, by_shard.get(number, []), numel, directory)
    return StoredParameter(name, sharding, entry.shape, [by_shard[n] for n in range(num_shards)])


def _is_cut(entry: ParameterEntry) -> bool:
    """Whether the slices add up to the full tensor."""
    dim, size = entry.dim or 0, entry.full_size
    return size is not None and dim < len(entry.shape) and (
        entry.shape[dim] * entry.num_shards >= size
    )  # fmt: skip


def _check_tiling(
    name: str, number: int, shard: Sequence[Piece], numel: int, directory: Path
) -> None:
    position = 0
    files = [str(directory / shard_name(piece.rank)) for piece in shard]
    spans = [(piece.start, piece.stop) for piece in shard]
    for (start, stop), path in zip([*spans, (numel, 0)], [*files, ""], strict=True):
        if start != position or not shard:
            where = f" before {path!r}" if path else f" in {str(directory)!r}"
            raise CheckpointError(
                f"parameter {name!r}, slice {number}: optimizer state of elements {position} to "
                f"{start} is missing or duplicate{where}, expected 0 to {numel} once each; "
                f"{RESTORE}"
            )
        position = stop
