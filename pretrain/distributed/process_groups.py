"""Set-up and tear-down of torch.distributed from the environment of a launcher."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.cpu.collector import imports_uncollected
from parallel.cpu.compat import (
    device_type,
    distributed_backend,
    prepare_deepspeed,
    prepare_environment,
)
from pretrain.distributed.consensus import RankGroup
from pretrain.distributed.rendezvous import World, rendezvous
from pretrain.errors import ConfigError
from pretrain.supervision.flight_recorder import keep_records

_AFTER_WATCHDOG = 30.0  # seconds


def prepare() -> None:
    """Import DeepSpeed and set the environment of a training process; call it first."""
    prepare_environment()
    keep_records()
    _silence_import_warnings()
    with imports_uncollected():
        import deepspeed  # noqa: F401  takes seconds: do it before other ranks wait

    prepare_deepspeed()


@contextmanager
def process_group(
    *, tensor_size: int = 1, store: dist.Store | None = None, timeout: float | None = None
) -> Iterator[torch.device]:
    """Initialise torch.distributed and DeepSpeed; yields this process's device.

    `tensor_size`: of the run, because the order of CUDA kernels is fixed when CUDA starts. `store`:
    of `rendezvous`; by default the ranks meet here. A single process needs no port. The group is
    destroyed at the end, also after an error: torch otherwise sometimes aborts at exit.

    Raises:
        ConfigError: the rendezvous address cannot be used, or there are fewer devices than ranks.
        RendezvousError: ranks are missing.
    """
    prepare()
    import deepspeed

    world = World.from_environment()
    device = torch.device("cpu")
    if device_type() == "cuda":
        if tensor_size > 1:
            # Lets Megatron-Core overlap its collectives with the GEMMs that follow.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        index = device_index(
            world.local_rank, torch.cuda.device_count(), in_task="SLURM_PROCID" in os.environ
        )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    # Split-K GEMMs of cuBLAS, such as those of weight gradients, would reduce their partial sums in
    # bf16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Without a device_id, with which every rank takes part in making every group of any ranks:
    # hundreds of them at 1,024 ranks. Communicators are made by their members, when first used.
    # Two stages that send to each other then have one of their own; with a device_id all sends
    # would take turns in that of all ranks.
    dist.init_process_group(
        distributed_backend(),
        store=rendezvous(world, purpose="", timeout=timeout) if store is None else store,
        rank=world.rank,
        world_size=world.size,
        timeout=group_timeout(timeout),
    )
    try:
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed requires it
        deepspeed.init_distributed(dist_backend=distributed_backend(), verbose=False)
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def build_rank_group(timeout: float | None) -> RankGroup:
    """Gloo groups of all ranks, over which they agree on small things (collective)."""
    return RankGroup.of_world(group_timeout(timeout))


def device_index(local_rank: int, num_devices: int, *, in_task: bool) -> int:
    """The device of a rank among those that it sees; Slurm may show a task its own one alone.

    Raises:
        ConfigError: there are more ranks than devices.
    """
    if in_task and num_devices == 1:
        return 0
    if local_rank >= num_devices:
        raise ConfigError(
            f"LOCAL_RANK={local_rank} with {num_devices} CUDA devices: every rank needs one; start "
            f"at most {num_devices} ranks here"
        )
    return local_rank


def group_timeout(timeout: float | None) -> timedelta | None:
    """Timeout of collectives: later than the watchdog, which can name the missing rank."""
    return None if timeout is None else timedelta(seconds=timeout + _AFTER_WATCHDOG)


def limit_groups(timeout: float | None) -> None:
    """Give every process group of this process the timeout of `group_timeout`.

    Groups created by DeepSpeed, Megatron-Core and device meshes do not inherit the timeout of the
    default group: they wait for half an hour (torch 2.13), and DeepSpeed's `new_group` takes none.
    """
    limit = group_timeout(timeout)
    if limit is not None:
        for group in process_groups():
            distributed_c10d._set_pg_timeout(limit, group)


def process_groups() -> list[dist.ProcessGroup]:
    """All groups that this process is a member of; torch has no public list."""
    return list(distributed_c10d._world.pg_map)


def _silence_import_warnings() -> None:
    """Silence import-time warnings of third-party libraries."""
    for module in ("deepspeed", "megatron", "torch.distributed", "torch.utils.cpp_extension"):
        warnings.filterwarnings("ignore", module=rf"{module}.*")
