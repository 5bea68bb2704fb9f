"""The files of a checkpoint that one rank writes: optimizer state, weights, and small states."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from parallel.checkpoint.errors import CheckpointError, one_line
from parallel.checkpoint.manifest import FileEntry
from parallel.checkpoint.storage import Storage
from parallel.checkpoint.weight_slices import WeightPlace
from parallel.checkpoint.weights import ShardPosition, Weight, write_shard
from pretrain.checkpointing.index import FOLDER, HEADER, shard_name
from pretrain.checkpointing.optimizer_shards import OptimizerShard, check_masters
from pretrain.checkpointing.rng_state import write_rng_state
from pretrain.checkpointing.selection import TRAINER_NAME, rng_file_name


class CheckpointContents(NamedTuple):
    """One rank's contribution to a checkpoint.

    `weights`: loaded by every rank, written by the one rank of each (pipeline, tensor) position
    that has `writes_weights`. `rng`: states of this rank's generators. `trainer`: used from rank 0.
    `optimizer`: returns this rank's optimizer state. Where only DeepSpeed can write that,
    `write_engine` takes its place: it is collective and returns the files that this rank wrote
    below the given directory (`save_engine_state`).
    """

    step: int
    weights: Sequence[Weight]
    rng: Mapping[str, Tensor]
    trainer: Mapping[str, Any]
    optimizer: Callable[[], OptimizerShard] | None = None
    write_engine: Callable[[Path], Sequence[Path]] | None = None
    position: ShardPosition = ShardPosition()
    writes_weights: bool = True
    weights_metadata: Mapping[str, str] = {}


class _Part(NamedTuple):
    """Files that a rank has written, and what the index says of them: the header of its optimizer
    file, the places of its weights."""

    paths: Sequence[Path] = ()
    header: str = "{}"
    places: Mapping[str, WeightPlace] = {}


class Written(NamedTuple):
    """The report of a rank to rank 0, which writes index and manifest."""

    files: dict[str, FileEntry]
    header: str
    places: dict[str, WeightPlace]


class RankFiles:
    """Writes the files of `rank`, and reads them back."""

    def __init__(self, rank: int, storage: Storage) -> None:
        self._rank, self._storage = rank, storage

    def write(
        self, directory: Path, contents: CheckpointContents, progress: Callable[[str], object]
    ) -> tuple[Written | None, str | None]:
        """Write, flush and checksum this rank's files; returns the report, or why there is none.

        After a failed part the rank still takes part in the next ones: they are collective.
        """
        not_saved = f"step_{contents.step} was not saved, rank {self._rank}"
        parts: list[_Part] = []
        failure: str | None = None
        for what, write in (
            ("optimizer", self._write_optimizer),
            ("weights", self._write_weights),
            ("state", self._write_state),
        ):
            progress(f"writing {what}")
            try:
                parts.append(write(directory, contents))
            except (OSError, RuntimeError, ValueError) as error:
                failure = failure or f"{not_saved}: {one_line(error)}"
        if failure is not None:
            return None, failure
        optimizer, weights, _ = parts
        paths = [path for part in parts for path in part.paths]
        files = {}
        try:
            for path in paths:
                name = path.relative_to(directory).as_posix()
                progress(f"reading back {name}")
                files[name] = self.entry(path)
        except OSError as error:
            return None, f"{not_saved}: {one_line(error)}"
        return Written(files, optimizer.header, dict(weights.places)), None

    def entry(self, path: Path) -> FileEntry:
        """Size and checksum of a written file, read back."""
        size, sha256 = self._storage.record(path)
        return FileEntry(size=size, sha256=sha256, rank=self._rank)

    def _write_optimizer(self, directory: Path, contents: CheckpointContents) -> _Part:
        paths: list[Path] = []
        if contents.write_engine is not None:
            self._storage.point("engine", directory)
            paths += contents.write_engine(directory)
            for path in paths:
                self._storage.sync(path)
        if contents.optimizer is None:
            return _Part(paths)
        shard, path = contents.optimizer(), directory / FOLDER / shard_name(self._rank)
        check_masters(shard)
        metadata = shard.metadata
        with self._storage.create(path) as file:
            write_shard(file, shard.elements, position=contents.position, metadata=metadata)
        return _Part([*paths, path], header=metadata[HEADER])

    def _write_weights(self, directory: Path, contents: CheckpointContents) -> _Part:
        write = partial(write_shard, position=contents.position, metadata=contents.weights_metadata)
        if not contents.writes_weights:
            write(None, contents.weights)
            return _Part()
        path = directory / "weights" / contents.position.file_name
        with self._storage.create(path) as file:
            write(file, contents.weights)
        stage = contents.position.pipeline_rank
        places = {
            weight.name: WeightPlace(stage, weight.sharding.dim, weight.sharding.full_size)
            for weight in contents.weights
        }
        return _Part([path], places=places)

    def _write_state(self, directory: Path, contents: CheckpointContents) -> _Part:
        paths = [directory / "rng" / rng_file_name(self._rank)]
        with self._storage.create(paths[0]) as file:
            write_rng_state(file, contents.rng)
        if self._rank == 0:
            paths.append(directory / TRAINER_NAME)
            self._storage.write(paths[1], _json_bytes(contents.trainer))
        return _Part(paths)


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(content, indent=1) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the trainer state is not JSON: {error}") from error
