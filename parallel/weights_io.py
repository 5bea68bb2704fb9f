"""Model weights on disk: one safetensors file per (pipeline, tensor) rank, read back merged.

A directory holds `pp_00_tp_00.safetensors`, ... Every file states its place in the grid and how
each of its tensors is sharded, so the directory needs nothing else to be read at any other layout.
No pickle is involved, and neither side holds more than one tensor beyond the model itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.sharding import Sharding, merge, sharding_of

LAYOUT_KEY = "manyformer_layout"
_SHARD_NAME = re.compile(r"pp_(\d{2,4})_tp_(\d{2,4})\.safetensors")
_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WeightsError(ValueError):
    """A weights directory that is incomplete, inconsistent or damaged."""


class ShardPosition(NamedTuple):
    """The place of one file in the (pipeline, tensor) grid."""

    pipeline_rank: int = 0
    pipeline_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1

    @classmethod
    def of(cls, ctx: ParallelContext) -> ShardPosition:
        return cls(ctx.pipeline.rank, ctx.pipeline.size, ctx.tensor.rank, ctx.tensor.size)

    @property
    def file_name(self) -> str:
        return f"pp_{self.pipeline_rank:02d}_tp_{self.tensor_rank:02d}.safetensors"


class Weight(NamedTuple):
    """One tensor to be written: what is known without touching the data, and how to get the data.

    `load` returns this tensor rank's slice, of `shape` and `dtype`. It may be a collective call
    (ZeRO-3 gathers a parameter), so every rank calls it for every weight, in the same order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharding: Sharding
    load: Callable[[], Tensor]


def module_weights(
    module: nn.Module,
    *,
    read: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    skip: Container[str] = (),
) -> list[Weight]:
    """Parameters and persistent buffers of `module`, a shared one once under its first name.

    Args:
        read: maps a parameter to its full local tensor; needed where ZeRO-3 has partitioned it, or
            expert ranks share it: a file holds the experts of all of them.
        skip: names that another pipeline stage writes (the copy of a tied parameter).

    Raises:
        ValueError: a parameter that does not declare its sharding.
    """
    weights: list[Weight] = []
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        # Transformer Engine keeps pickled FP8 scales under this name; they are rebuilt.
        if name.endswith("_extra_state") or not isinstance(tensor, Tensor):
            continue
        if id(tensor) in seen or name in skip:
            continue
        seen.add(id(tensor))
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor
        # Buffers are the same on every tensor rank; parameters have to say so.
        sharding = sharding_of(name, tensor) if isinstance(tensor, nn.Parameter) else Sharding()
        if sharding.experts is not None:
            shape = (sharding.experts, *shape[1:])
        weights.append(Weight(name, shape, tensor.dtype, sharding, partial(read, tensor)))
    return weights


def write_shard(
    file: BinaryIO | None,
    weights: Sequence[Weight],
    *,
    position: ShardPosition,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Stream `weights` to `file` in safetensors format, holding one of them on the CPU at a time.

    With `file=None` the rank only takes part in the collectives of `Weight.load`. A write that
    fails (disk full) raises after the remaining loads: the other ranks are not left waiting.

    Raises:
        OSError: from the file, after all loads.
        WeightsError: a tensor that differs from its declared shape or dtype.
    """
    # Widest dtype first, as safetensors does: every tensor then starts aligned to its dtype.
    ordered = sorted(weights, key=lambda weight: -weight.dtype.itemsize)
    failure: OSError | None = None
    if file is not None:
        try:
            file.write(_header(ordered, _layout_text(weights, position), metadata or {}))
        except OSError as error:
            failure = error
    for weight in ordered:
        tensor = weight.load()
        if file is None or failure is not None:
            continue
        if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
            raise WeightsError(
                f"weight {weight.name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"declared {weight.dtype} {weight.shape}"
            )
        try:
            file.write(_raw_bytes(tensor))
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure


def _layout_text(weights: Sequence[Weight], position: ShardPosition) -> str:
    table = {w.name: [w.sharding.dim, w.sharding.full_size] for w in weights}
    return json.dumps({"position": list(position), "sharding": table})


def _header(weights: Sequence[Weight], layout: str, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {**metadata, LAYOUT_KEY: layout}}
    offset = 0
    for name, shape, dtype, _, _ in weights:
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class _Shard(NamedTuple):
    path: Path
    file: Any
    position: ShardPosition
    shardings: dict[str, Sharding]
    metadata: dict[str, str]


class ShardedWeightsReader:
    """Full tensors of a weights directory, merged over tensor ranks one at a time.

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
        self.metadata = {k: v for k, v in shards[0].metadata.items() if k != LAYOUT_KEY}

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
        shape = list(shard.file.get_slice(name).get_shape())
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
            return shards[0].file.get_tensor(name)
        slices = [shard.file.get_tensor(name) for shard in shards]
        _check_slices(name, slices, sharding, shards)
        return merge(slices, sharding)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names():
            yield name, self.full(name)

    def _stage(self, name: str) -> int:
        if name not in self._stage_of:
            raise WeightsError(f"no weight {name!r} in {str(self.directory)!r}")
        return self._stage_of[name]

    def _open(self, path: Path) -> _Shard:
        try:
            file = self._open_files.enter_context(safe_open(path, framework="pt"))
            metadata = file.metadata() or {}
            layout = json.loads(metadata[LAYOUT_KEY])
            position = ShardPosition(*map(_count, layout["position"]))
            shardings = {
                name: Sharding(
                    dim=None if dim is None else _count(dim),
                    full_size=None if full_size is None else _count(full_size),
                )
                for name, (dim, full_size) in layout["sharding"].items()
            }
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{str(path)!r} is not a readable safetensors file: {error}"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{str(path)!r} was not written by manyformer: no valid layout"
            ) from error
        if path.name != position.file_name or set(file.keys()) != set(shardings):
            raise WeightsError(
                f"{str(path)!r} does not hold what its header says: expected {position}"
            )
        return _Shard(path, file, position, shardings, metadata)


def find_weights(path: Path) -> Path:
    """The weights directory meant by `path`: itself, a checkpoint's, or that of a run's newest.

    Raises:
        WeightsError: nothing of the kind there.
    """
    steps = [
        (int(match[1]), entry)
        for entry in _entries(path / "checkpoints")
        if (match := _STEP_NAME.fullmatch(entry.name)) and (entry / "manifest.json").is_file()
    ]
    newest = [max(steps)[1] / "weights"] if steps else []
    for candidate in [path, path / "weights", *newest]:
        if any(_SHARD_NAME.fullmatch(entry.name) for entry in _entries(candidate)):
            return candidate
    raise WeightsError(
        f"no weights in {str(path.absolute())!r}: give a run directory, a checkpoint (step_N) or a "
        "directory of pp_XX_tp_XX.safetensors files"
    )


def verify_weights(directory: Path) -> None:
    """Compare the files with the checkpoint's manifest, where the directory belongs to one.

    Raises:
        WeightsError: a file whose size or sha256 differs; the message has both values.
    """
    manifest = directory.parent / "manifest.json"
    if not manifest.is_file():
        return
    try:
        files = json.loads(manifest.read_bytes())["files"]
        for path in _shard_files(directory):
            expected = files[f"{directory.name}/{path.name}"]["sha256"]
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected:
                raise WeightsError(
                    f"{str(path)!r} is damaged: sha256 {actual}, expected {expected}"
                )
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(
            f"{str(manifest)!r} is damaged or not of this checkpoint: {error}"
        ) from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} counts nothing")
    return value


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
            f"{str(directory)!r} lacks {', '.join(named)} ({num_wanted - len(shards)} files)"
        )
    for shard in shards:
        if shard.position[1::2] != first[1::2] or len(shards) != num_wanted:
            raise WeightsError(
                f"{str(shard.path)!r} is not part of the grid of {str(shards[0].path)!r}"
            )
    grid = [[by_place[p, t] for t in range(first.tensor_size)] for p in range(first.pipeline_size)]
    for stage in grid:
        for shard in stage:
            if shard.shardings != stage[0].shardings:
                raise WeightsError(
                    f"{str(shard.path)!r} and {str(stage[0].path)!r} hold different weights"
                )
    return grid


def _stage_of_names(grid: Sequence[Sequence[_Shard]]) -> dict[str, int]:
    stage_of: dict[str, int] = {}
    for stage, shards in enumerate(grid):
        for name in shards[0].shardings:
            if name in stage_of:
                raise WeightsError(
                    f"weight {name!r} is in pipeline stages {stage_of[name]} and {stage}"
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
                f"{slices[0].dtype} {tuple(slices[0].shape)} in {str(shards[0].path)!r}"
            )
    dim, full_size = sharding.dim, sharding.full_size
    if dim is None or full_size is None or slices[0].dim() <= dim:
        raise WeightsError(
            f"weight {name!r} of shape {tuple(slices[0].shape)} cannot be {sharding}"
        )
    if slices[0].shape[dim] * len(slices) < full_size:
        raise WeightsError(
            f"weight {name!r} has {slices[0].shape[dim]} x {len(slices)} tensor ranks along "
            f"dimension {dim}, expected {full_size} or more"
        )
