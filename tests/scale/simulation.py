"""Ranks of a run file at any size, simulated one by one: their start and their restore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.context import Axis
from pretrain.checkpointing.index import FlatRange, join_headers
from pretrain.checkpointing.optimizer_shards import MASTER, StoredOptimizer, Wanted
from pretrain.config.compose import compose_config
from pretrain.config.layout import check_layout
from pretrain.config.resolve import resolve_run
from pretrain.config.schema import RunConfig, parse_config, resolved
from pretrain.distributed.process_groups import build_rank_group, process_group
from pretrain.distributed.rendezvous import World
from pretrain.engine.build import build_engine
from pretrain.engine.deepspeed_optimizer import OptimizerView
from pretrain.engine.train_spec import TrainSpec, build_context, build_precision
from pretrain.prove.sizes import halve
from tests.distributed import run_ranks
from tests.scale.fake_world import Groups, counted_groups, fake_world


class Layout(NamedTuple):
    """Tensor and pipeline ranks; all others are data ranks."""

    tensor: int
    pipeline: int

    def ranks_of_stage(self, stage: int, world_size: int) -> range:
        size = world_size // self.pipeline
        return range(stage * size, (stage + 1) * size)


class Started(NamedTuple):
    """What a rank has after its start.

    `ranges`: the optimizer state that it writes at a save, by parameter. `wanted`: what it reads at
    a restore, as (parameter, first element, end) of its tensor rank's slice.
    """

    groups: Groups
    ranges: dict[str, FlatRange]
    wanted: list[tuple[str, int, int]]


class Restored(NamedTuple):
    """The reads of a rank at a restore: files of optimizer state, and elements against its own."""

    num_files: int
    num_read: int
    num_owned: int


def narrow(config_name: str, layout: Layout, world_size: int) -> RunConfig:
    """The run file at a layout, as deep as it is, with the narrowest layers that it accepts.

    Raises:
        ConfigError: there is no such run file, or it does not fit the layout or the ranks.
    """
    overrides = [f"parallel.{name}={size}" for name, size in layout._asdict().items()]
    if layout.tensor == 1:  # where it would have no effect
        overrides.append("parallel.sequence_parallel=false")
    values = resolved(compose_config(config_name, overrides=overrides))
    data_size = world_size // (layout.tensor * layout.pipeline)
    values["training"] |= {
        "batch_size": 1,
        "gradient_accumulation_steps": max(1, layout.pipeline),
        "max_steps": 10,
        "max_tokens": None,
        "warmup_steps": 1,
        "decay_steps": 0,
        "batch_ramp": [],
    }
    values["logging"] = {"tensorboard": False}

    def accepts(changed: Mapping[str, Any]) -> bool:
        try:
            check_layout(parse_config(changed), layout.tensor * layout.pipeline * data_size)
        except ValueError:
            return False
        return True

    depth = {"model.num_layers": values["model"]["num_layers"]}
    config = parse_config(halve(values, accepts, limits=depth))
    check_layout(config, world_size)
    return config


def start(config: RunConfig, store: dist.Store | None = None) -> Started:
    """Start this rank: groups, its part of the model, and the engine, as `pretrain.run` does."""
    settings = resolve_run(config, None, world_size=World.from_environment().size)
    with counted_groups() as groups, process_group(store=store) as device:
        build_rank_group(None)
        ctx = build_context(settings.config, precision=build_precision(config), device=device)
        engine = build_engine(TrainSpec.of(settings.config, settings.ds_config, ctx))
        live = OptimizerView(
            engine._deepspeed, data_size=ctx.data.size, expert_rank=ctx.expert.rank
        )
        wanted = [
            (each.name, each.location.start, each.location.start + each.length)
            for each in live.fragments
        ]
        return Started(groups, engine.optimizer_shard().ranges, wanted)


def start_ranks(config: RunConfig, ranks: Iterable[int], world_size: int) -> dict[int, Started]:
    """Start each of `ranks` in a process of its own, one after the other."""
    return {
        rank: run_ranks(_start_alone, 1, config, rank, world_size, init=False)[0] for rank in ranks
    }


def _start_alone(config: RunConfig, rank: int, world_size: int) -> Started:
    with fake_world(rank, world_size):
        return start(config, dist.HashStore())


def plan_restores(stage: Mapping[int, Started], *, tensor: int) -> dict[int, Restored]:
    """The reads of all ranks of a stage at the layout that has saved."""
    place = Path("optimizer")
    headers = [(rank, each.ranges) for rank, each in stage.items()]
    stored = StoredOptimizer(place, join_headers(headers, directory=place))
    stored.check()
    return {
        rank: _plan(stored, each.wanted, Axis(size=tensor, rank=rank % tensor))
        for rank, each in stage.items()
    }


def _plan(
    stored: StoredOptimizer, wanted: Sequence[tuple[str, int, int]], tensor: Axis
) -> Restored:
    targets = [
        Wanted(name, begin, {MASTER: torch.empty(end - begin, device="meta")})
        for name, begin, end in wanted
    ]
    files = stored.plan(targets, tensor=tensor)
    read = sum(copy.rows * copy.columns for copies in files.values() for copy in copies)
    return Restored(len(files), read, sum(end - begin for _, begin, end in wanted))
