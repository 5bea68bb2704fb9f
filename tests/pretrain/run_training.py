"""`pretrain.run.run`, of a configuration that is resolved on the rank that runs it."""

from __future__ import annotations

from pretrain.config import RunConfig
from pretrain.config.resolve import resolve_run
from pretrain.distributed.rendezvous import World
from pretrain.run import run


def run_training(config: RunConfig, ds_config_path: str | None = None) -> int:
    world_size = World.from_environment().size
    return run(resolve_run(config, ds_config_path, world_size=world_size))
