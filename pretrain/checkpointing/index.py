"""index.json of a checkpoint: which file holds which elements of which parameter.

Written once at a save, from what every rank reports about its files, and covered by the manifest.
At a restore rank 0 reads it for all ranks, so that each opens only the files that it needs.
Checkpoints of earlier versions have none: rank 0 then collects it from the headers of all files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from safetensors import SafetensorError

from parallel.checkpoint.errors import RESTORE, CheckpointError
from parallel.checkpoint.tensor_file import TensorFile
from parallel.checkpoint.weight_slices import WeightPlace, WeightsTable
from parallel.checkpoint.weights_reader import ShardedWeightsReader

T = TypeVar("T")
INDEX_NAME = "index.json"
FOLDER = "optimizer"
HEADER = "manyformer_optimizer"
_SHARD_NAME = re.compile(r"rank_([0-9]{5,9})\.safetensors")


def shard_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FlatRange(_Record):
    """Elements [start, start + length) of the slice `shard` of `num_shards`, flattened."""

    shape: tuple[NonNegativeInt, ...]
    dim: NonNegativeInt | None
    full_size: NonNegativeInt | None
    shard: NonNegativeInt
    num_shards: PositiveInt
    start: NonNegativeInt
    length: NonNegativeInt
    step: NonNegativeInt


_HEADER = TypeAdapter(dict[str, FlatRange])


class ParameterEntry(_Record):
    """The slices of one parameter: `shape` of each, cut along `dim` of the full tensor, which has
    `full_size` there; and the pieces of them, as [rank, shard, start, length, step]."""

    shape: tuple[NonNegativeInt, ...]
    dim: NonNegativeInt | None
    full_size: NonNegativeInt | None
    num_shards: PositiveInt
    # Not a NamedTuple: there may be millions, and pydantic validates those five times as slowly.
    pieces: list[
        tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]
    ]

    def span(self, shard: int, start: int, length: int, step: int) -> FlatRange:
        """A piece as the header of its file says it."""
        return FlatRange(
            shape=self.shape,
            dim=self.dim,
            full_size=self.full_size,
            shard=shard,
            num_shards=self.num_shards,
            start=start,
            length=length,
            step=step,
        )


class _Weights(_Record):
    pipeline_size: PositiveInt
    tensor_size: PositiveInt
    places: dict[str, tuple[NonNegativeInt, NonNegativeInt | None, NonNegativeInt | None]]


class _Content(_Record):
    optimizer: dict[str, ParameterEntry]
    weights: _Weights


class CheckpointIndex(NamedTuple):
    """Optimizer state by parameter, and the weights."""

    optimizer: dict[str, ParameterEntry]
    weights: WeightsTable

    def to_bytes(self) -> bytes:
        """One parameter per line."""
        optimizer = {name: entry.model_dump(mode="json") for name, entry in self.optimizer.items()}
        return _dump({"optimizer": optimizer, "weights": self.weights._asdict()})


def _dump(content: Mapping[str, Mapping[str, Any]]) -> bytes:
    sections = (
        f"{json.dumps(title)}: {{\n"
        + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in section.items())
        + "\n}"
        for title, section in content.items()
    )
    return ("{" + ",\n".join(sections) + "}\n").encode("ascii")


def parse_index(raw: bytes, *, source: Path) -> CheckpointIndex:
    """Parse `CheckpointIndex.to_bytes`.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        content = _Content.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "all of it"
        if first["type"] == "extra_forbidden":
            raise CheckpointError(
                f"{str(source)!r} has {place}, which this version of manyformer does not know; use "
                "the version that wrote the checkpoint, or another checkpoint"
            ) from error
        raise CheckpointError(
            f"{str(source)!r} is not the index of a checkpoint: {place}: {first['msg']}; {RESTORE}"
        ) from error
    weights = content.weights
    places = {name: WeightPlace(*place) for name, place in weights.places.items()}
    table = WeightsTable(weights.pipeline_size, weights.tensor_size, places)
    return CheckpointIndex(content.optimizer, table)


def read_index(checkpoint: Path) -> bytes:
    """The index of a checkpoint; of one of an earlier version, collected from all of its files.

    Raises:
        CheckpointError, WeightsError: a file is missing, damaged or foreign.
    """
    path = checkpoint / INDEX_NAME
    if path.is_file():
        return path.read_bytes()
    with ShardedWeightsReader(checkpoint / "weights") as reader:
        weights = reader.table()
    return CheckpointIndex(collect_optimizer(checkpoint / FOLDER), weights).to_bytes()


def collect_optimizer(directory: Path) -> dict[str, ParameterEntry]:
    """The optimizer section of the index, from the header of every file.

    Raises:
        CheckpointError: a foreign file, or files of several checkpoints.
    """
    headers = {}
    for path in sorted(directory.iterdir()):
        match = _SHARD_NAME.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{str(path)!r} was not written by manyformer, whose files here are called "
                f"{shard_name(0)} and so on; move it away"
            )
        try:
            with TensorFile(path) as file:
                headers[int(match[1])] = file_header(file, parse_header)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read ({error}); {RESTORE}") from error
    return join_headers(headers.items(), directory=directory)


def file_header(file: TensorFile, parse: Callable[[str], T]) -> T:
    """The content of an open file, by its own header.

    Raises:
        CheckpointError: it says nothing, or nothing that `parse` can read.
    """
    try:
        return parse(file.metadata[HEADER])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(file.path)!r} has no valid header {HEADER!r}, so it was not written by "
            f"manyformer; {RESTORE}"
        ) from error


def parse_header(text: str) -> dict[str, FlatRange]:
    """The content of a rank's file: parameter -> its elements."""
    return _HEADER.validate_json(text)


def join_headers(
    headers: Iterable[tuple[int, Mapping[str, FlatRange]]], *, directory: Path
) -> dict[str, ParameterEntry]:
    """The optimizer section of the index, from (rank, what its file holds).

    Raises:
        CheckpointError: two files differ in how a parameter is cut.
    """
    entries: dict[str, ParameterEntry] = {}
    for rank, header in headers:
        for name, span in header.items():
            cut = (span.shape, span.dim, span.full_size, span.num_shards)
            entry = entries.get(name)
            if entry is None:
                shape, dim, full_size, num_shards = cut
                entry = ParameterEntry(
                    shape=shape, dim=dim, full_size=full_size, num_shards=num_shards, pieces=[]
                )
                entries[name] = entry
            elif cut != (entry.shape, entry.dim, entry.full_size, entry.num_shards):
                expected = (entry.shape, entry.dim, entry.full_size, entry.num_shards)
                first = directory / shard_name(entry.pieces[0][0])
                raise CheckpointError(
                    f"{str(directory / shard_name(rank))!r}: parameter {name!r} is {cut}, "
                    f"{expected} in {str(first)!r}; keep the files of one checkpoint only"
                )
            entry.pieces.append((rank, span.shard, span.start, span.length, span.step))
    return entries
