"""From the environment of a launcher to an initialised process group, and back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.cpu.compat import (
    device_type,
    distributed_backend,
    prepare_deepspeed,
    prepare_environment,
)
from pretrain.distributed.rendezvous import World, rendezvous

_AFTER_WATCHDOG = 30.0  # seconds


def prepare() -> None:
    """Import and set what every process that trains needs; call before all else here."""
    prepare_environment()
    _quiet_imports()
    import deepspeed  # noqa: F401  seconds, in which no other rank waits

    prepare_deepspeed()


@contextmanager
def process_group(
    *, tensor_size: int = 1, store: dist.Store | None = None, timeout: float | None = None
) -> Iterator[torch.device]:
    """Initialise torch.distributed and DeepSpeed; yields this process's device.

    `tensor_size` is that of the run: how CUDA orders kernels is fixed when it starts. `store` is
    where the ranks have met (`rendezvous.meet`); by default they meet here. One process alone needs
    no port. The group is destroyed in the end, also after an error: torch otherwise aborts the
    process now and then while it exits.

    Raises:
        ConfigError: the rendezvous address cannot be used.
        RendezvousError: ranks are missing.
    """
    prepare()
    import deepspeed

    world = World.from_environment()
    device = torch.device("cpu")
    if device_type() == "cuda":
        if tensor_size > 1:
            # Lets Megatron-Core overlap its collectives with the matrix products that follow.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    # A product that cuBLAS splits over its inner dimension, as gradients of weights are, would add
    # the parts up in bf16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    dist.init_process_group(
        distributed_backend(),
        store=rendezvous(world, purpose="", timeout=timeout) if store is None else store,
        rank=world.rank,
        world_size=world.size,
        timeout=group_timeout(timeout),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed requires it
        deepspeed.init_distributed(dist_backend=distributed_backend(), verbose=False)
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def group_timeout(timeout: float | None) -> timedelta | None:
    """When collectives fail by themselves: after the watchdog, which can say who is missing."""
    return None if timeout is None else timedelta(seconds=timeout + _AFTER_WATCHDOG)


def limit_groups(timeout: float | None) -> None:
    """Give every process group of this process the timeout of `group_timeout`.

    Groups that DeepSpeed, Megatron-Core and device meshes make do not inherit that of the default
    group: they wait for half an hour (torch 2.13), and DeepSpeed's `new_group` takes no timeout.
    """
    limit = group_timeout(timeout)
    if limit is not None:
        for group in process_groups():
            distributed_c10d._set_pg_timeout(limit, group)


def process_groups() -> list[dist.ProcessGroup]:
    """All groups that this process is a member of; torch has no public list."""
    return list(distributed_c10d._world.pg_map)


def _quiet_imports() -> None:
    """Libraries warn about what they were not asked for; a run starts with its own words."""
    for module in ("deepspeed", "megatron", "torch.distributed", "torch.utils.cpp_extension"):
        warnings.filterwarnings("ignore", module=rf"{module}.*")
