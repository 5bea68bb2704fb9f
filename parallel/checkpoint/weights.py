"""Model weights on disk: one safetensors file per (pipeline, tensor) rank.

A directory holds `pp_00_tp_00.safetensors`, ... Every file states its position in the grid and how
each of its tensors is sharded, so that the directory alone can be read at any other layout
(`weights_reader`). Nothing is pickled, and at most one tensor is held in memory beyond the model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.sharding import Sharding, local_shape, sharding_of

LAYOUT_KEY = "manyformer_layout"
FILE_BYTES = 4 * 1024**3  # of an imported model, unless a layer has more
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
    """The position of one file in the (pipeline, tensor) grid."""

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
    """One tensor to be written: its metadata, and a function that loads its data.

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
    """Parameters and persistent buffers of `module`; a shared one once, under its first name.

    Args:
        read: maps a parameter to its full local tensor; needed where ZeRO-3 has partitioned it, or
            where expert ranks share it, since a file holds the experts of all of them.
        skip: names that another pipeline stage writes (the copy of a tied parameter).

    Raises:
        ValueError: a parameter does not declare its sharding.
    """
    weights: list[Weight] = []
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        # FP8 scales (parallel/fp8/history.py), which belong to a layout, are kept under this name.
        if name.endswith("_extra_state") or not isinstance(tensor, Tensor):
            continue
        if id(tensor) in seen or name in skip:
            continue
        seen.add(id(tensor))
        shape = local_shape(tensor)
        # Buffers are equal on every tensor rank; parameters have to declare it.
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

    With `file=None` the rank only takes part in the collectives of `Weight.load`. A failed write
    (disk full) is raised after the remaining loads, so that the other ranks do not hang.

    Raises:
        OSError: from the file, after all loads.
        WeightsError: a tensor differs from its declared shape or dtype.
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
                f"declared {weight.dtype} {weight.shape}; correct its declaration"
            )
        try:
            file.write(_raw_bytes(tensor))
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure


def write_files(directory: Path, weights: Sequence[Weight]) -> None:
    """Write a whole model as files of about `FILE_BYTES`, cut between layers as for stages.

    Several files are hashed, read and copied at a time, one is not.

    Raises:
        OSError, WeightsError: see `write_shard`.
    """
    files = _cut(weights)
    for number, each in enumerate(files):
        position = ShardPosition(number, len(files))
        with (directory / position.file_name).open("wb") as file:
            write_shard(file, each, position=position)


def _cut(weights: Sequence[Weight]) -> list[list[Weight]]:
    files: list[list[Weight]] = [[]]
    size = 0
    for _, layer in groupby(weights, key=lambda weight: weight.name.partition(".")[0]):
        of_layer = list(layer)
        more = sum(torch.Size(w.shape).numel() * w.dtype.itemsize for w in of_layer)
        if files[-1] and size + more > FILE_BYTES:
            files.append([])
            size = 0
        files[-1] += of_layer
        size += more
    return files


def parse_layout(text: str) -> tuple[ShardPosition, dict[str, Sharding]]:
    """Parse what a file says of itself under `LAYOUT_KEY`: its position, and its tensors' sharding.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, RecursionError: it was not written here.
    """
    layout = json.loads(text)
    shardings = {
        name: Sharding(
            dim=None if dim is None else _count(dim),
            full_size=None if full_size is None else _count(full_size),
        )
        for name, (dim, full_size) in layout["sharding"].items()
    }
    return ShardPosition(*map(_count, layout["position"])), shardings


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


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
