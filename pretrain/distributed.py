"""From the environment of a launcher to an initialised process group, and back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.cpu import device_type, distributed_backend, prepare_deepspeed, prepare_environment
from pretrain.errors import ConfigError


class World(NamedTuple):
    """This process among all of a run, as `deepspeed`, `torchrun` or `accelerate` describe it."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    def from_environment(cls) -> World:
        """RANK, LOCAL_RANK and WORLD_SIZE; one process when none of them is set."""
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
        )


@contextmanager
def process_group(*, tensor_size: int = 1) -> Iterator[torch.device]:
    """Initialise torch.distributed and DeepSpeed; yields this process's device.

    `tensor_size` is that of the run: how CUDA orders kernels is fixed when it starts. One process
    alone needs no port. The group is destroyed in the end, also after an error: torch otherwise
    aborts the process now and then while it exits.

    Raises:
        ConfigError: the rendezvous address cannot be used.
    """
    prepare_environment()
    _quiet_imports()
    import deepspeed

    prepare_deepspeed()
    world = World.from_environment()
    device = torch.device("cpu")
    if device_type() == "cuda":
        if tensor_size > 1:
            # Lets Megatron-Core overlap its collectives with the matrix products that follow.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    _initialize(world, device)
    try:
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed requires it
        deepspeed.init_distributed(dist_backend=distributed_backend(), verbose=False)
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _initialize(world: World, device: torch.device) -> None:
    backend = distributed_backend()
    device_id = device if device.type == "cuda" else None
    if "MASTER_ADDR" not in os.environ:
        if world.size > 1:
            raise ConfigError(
                f"WORLD_SIZE={world.size} without MASTER_ADDR and MASTER_PORT; "
                "start with deepspeed, torchrun or accelerate launch"
            )
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id
        )
        return
    try:
        dist.init_process_group(
            backend, rank=world.rank, world_size=world.size, device_id=device_id
        )
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"cannot open the rendezvous at {address} ({str(error).splitlines()[0]}); "
            "choose a free port with --master_port"
        ) from error


def _quiet_imports() -> None:
    """Libraries warn about what they were not asked for; a run starts with its own words."""
    for module in ("deepspeed", "megatron", "torch.distributed", "torch.utils.cpp_extension"):
        warnings.filterwarnings("ignore", module=rf"{module}.*")
