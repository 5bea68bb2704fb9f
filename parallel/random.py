"""Layout-independent weight initialisation.

The initial value of a weight is a function of (seed, parameter name, position): the full tensor is
split into tiles along the dimension that may be sharded, each tile has its own generator, and a
rank draws only the tiles that it holds. So a 70B model has the same initial weights at any tensor
and pipeline size, no rank ever holds a full matrix, and a layer may be built on the CPU or on a
device.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.cpu.side_by_side import side_by_side
from parallel.sharding import Constant, Init, Normal, Sharding, init_of, sharding_of

NUM_TILES = 64
_LARGE = 1 << 22  # elements, for which threads are worth their start


def initialize(
    module: nn.Module,
    *,
    seed: int,
    prefix: str,
    tensor_rank: int,
    expert_rank: int = 0,
    names: dict[str, str] | None = None,
) -> None:
    """Fill every parameter of `module` from its declared initialiser.

    `prefix` is the layer's name in the model; `names` gives the canonical name of a parameter tied
    to another layer's, so that both copies have the same initial values.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        canonical = (names or {}).get(name, f"{prefix}.{name}")
        drawn = _InitSpec(
            canonical, init_of(canonical, parameter), sharding_of(canonical, parameter)
        )
        # Not by no_grad, which the threads that draw would not inherit.
        weight = parameter.detach()
        _fill(weight, drawn, seed=seed, tensor_rank=tensor_rank, expert_rank=expert_rank)


def generator_for(seed: int, name: str, tile: int = 0) -> torch.Generator:
    """A CPU generator that depends only on the seed, the parameter's name and the tile."""
    digest = hashlib.blake2b(f"{seed}/{name}/{tile}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class _Rows(NamedTuple):
    """Rows [start, stop) along dimension `dim` of a full tensor with `full_size` rows."""

    dim: int
    full_size: int
    start: int
    stop: int


class _InitSpec(NamedTuple):
    """Initialisation of one tensor: the name that seeds it, the distribution, the sharding."""

    name: str
    init: Init
    sharding: Sharding


def _fill(
    target: Tensor, drawn: _InitSpec, *, seed: int, tensor_rank: int, expert_rank: int
) -> None:
    """Fill this rank's shard; stacked experts one by one, each seeded by its own index."""
    name, init, sharding = drawn
    if sharding.experts is None:
        _fill_one(target, drawn, seed=seed, tensor_rank=tensor_rank)
        return
    dim = None if sharding.dim is None else sharding.dim - 1
    for index, matrix in enumerate(target, start=expert_rank * len(target)):
        one = _InitSpec(f"{name}/{index}", init, Sharding(dim, sharding.full_size))
        _fill_one(matrix, one, seed=seed, tensor_rank=tensor_rank)


def _fill_one(target: Tensor, drawn: _InitSpec, *, seed: int, tensor_rank: int) -> None:
    name, init, sharding = drawn
    if isinstance(init, Constant):
        target.fill_(init.value)
        return
    if target.dim() == 0:
        target = target.view(1)  # one row; the memory is the same
    rows = _local_rows(target, sharding, tensor_rank)
    target.zero_()  # padding rows stay zero
    if not isinstance(init, Normal):
        shape = list(target.shape)
        shape[rows.dim] = rows.full_size
        full = init(torch.Size(shape), generator_for(seed, name))
        own = full.narrow(rows.dim, rows.start, rows.stop - rows.start)
        target.narrow(rows.dim, 0, rows.stop - rows.start).copy_(own)
        return
    _draw_tiles(target, rows, init.std, seed=seed, name=name)


def _local_rows(target: Tensor, sharding: Sharding, tensor_rank: int) -> _Rows:
    if sharding.dim is None:
        return _Rows(0, target.shape[0], 0, target.shape[0])
    extent, full_size = target.shape[sharding.dim], sharding.extent
    start = min(tensor_rank * extent, full_size)
    return _Rows(sharding.dim, full_size, start, min(start + extent, full_size))


def _draw_tiles(target: Tensor, rows: _Rows, std: float, *, seed: int, name: str) -> None:
    """Draw the tiles of the full tensor that overlap `rows`, as many at a time as this rank has
    threads; one of whole rows in its place, others beside it."""
    num_tiles = min(NUM_TILES, rows.full_size)
    bounds = [index * rows.full_size // num_tiles for index in range(num_tiles + 1)]
    own = [i for i in range(num_tiles) if bounds[i] < rows.stop and bounds[i + 1] > rows.start]
    # A number is drawn in the default dtype, in the order of memory.
    is_place = rows.dim == 0 and target.is_contiguous() and target.device.type == "cpu"
    is_place = is_place and target.dtype == torch.get_default_dtype()

    def draw(index: int) -> tuple[int, Tensor | None]:
        start, stop = bounds[index], bounds[index + 1]
        generator = generator_for(seed, name, index)
        if is_place and rows.start <= start and stop <= rows.stop:
            target[start - rows.start : stop - rows.start].normal_(0.0, std, generator=generator)
            return start, None
        tile_shape = list(target.shape)
        tile_shape[rows.dim] = stop - start
        return start, torch.empty(tile_shape).normal_(0.0, std, generator=generator)

    is_large = target.numel() >= _LARGE
    threads = torch.get_num_threads() if is_large else 1
    for start, tile in side_by_side(draw, own, threads=threads):
        if tile is None:
            continue
        first, last = max(start, rows.start), min(start + tile.shape[rows.dim], rows.stop)
        part = tile.narrow(rows.dim, first - start, last - first)
        target.narrow(rows.dim, first - rows.start, last - first).copy_(part)
