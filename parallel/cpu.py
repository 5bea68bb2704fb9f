"""Everything that differs on a machine without CUDA, in one place."""

from __future__ import annotations

import os

import torch


def device_type() -> str:
    """`cuda` where torch sees a CUDA device, otherwise `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def distributed_backend() -> str:
    """The torch.distributed backend that goes with `device_type`."""
    return "nccl" if device_type() == "cuda" else "gloo"


def prepare_environment() -> None:
    """Settings that libraries read while they are imported; call before importing DeepSpeed."""
    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare_deepspeed() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory collective at start-up.

    `init_distributed` (0.19.8, comm/torch.py) builds the operator with g++ on every rank, for a
    minute or more, and a process killed meanwhile leaves a lock on which every later run waits.
    gloo does the same work. The table is probed lazily and edits to it persist.
    """
    if device_type() == "cpu":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def let_megatron_run_on_cpu() -> None:
    """Make `torch.cuda.current_device()` answer on a machine without CUDA.

    Megatron-Core (0.16.1, tensor_parallel/mappings.py and layers.py) uses the value only as the
    `device=` of buffers for sequence parallelism; there is no public option.
    """
    if device_type() == "cpu":
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
