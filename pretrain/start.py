"""From a launched process to a rank among others: met, watched, with its place in the layout."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from parallel.context import ParallelContext
from parallel.precision import Precision
from pretrain.config import RunConfig
from pretrain.config.layout import RunLayout
from pretrain.distributed.consensus import Ranks
from pretrain.distributed.process_groups import group_timeout, prepare, process_group
from pretrain.distributed.rendezvous import World, meet
from pretrain.engine.train_spec import build_context
from pretrain.supervision.signals import GracefulStop
from pretrain.supervision.watchdog import Watchdog


class Start(NamedTuple):
    """What a rank has once all of them have come."""

    stop: GracefulStop
    watchdog: Watchdog
    ctx: ParallelContext
    ranks: Ranks


def start(config: RunConfig, layout: RunLayout, precision: Precision, stack: ExitStack) -> Start:
    """Bring the ranks together, watched from the moment in which all have come; `stack` ends it."""
    stop = stack.enter_context(GracefulStop(starting=True))
    world, limit = World.from_environment(), config.watchdog.timeout
    prepare()
    store = meet(world, purpose=config.run_dir, timeout=limit)
    watchdog = Watchdog(
        Path(config.run_dir),
        rank=world.rank,
        size=world.size,
        store=store,
        timeout=limit,
        slow_ratio=config.watchdog.slow_ratio,
    )
    stack.enter_context(watchdog)
    watchdog.moved("the making of process groups")
    group = process_group(tensor_size=layout.tensor, store=store, timeout=limit)
    stack.push(watchdog.leave)  # of an error in what follows
    device = stack.enter_context(group)
    stack.push(watchdog.leave)  # of any other, before the group is destroyed
    ranks = agreement(limit)
    ctx = build_context(config, precision=precision, device=device)
    axes = {"tensor": ctx.tensor, "pipeline": ctx.pipeline, "data": ctx.data}
    watchdog.placed(
        ", ".join(f"{name} {axis.rank}" for name, axis in axes.items() if axis.size > 1),
        stage=ctx.pipeline.rank,
    )
    return Start(stop, watchdog, ctx, ranks)


def agreement(timeout: float | None) -> Ranks:
    """A gloo group of all ranks, over which they agree on small things (collective)."""
    return Ranks.of_group(dist.new_group(backend="gloo", timeout=group_timeout(timeout)))
