"""Adjustments for machines without CUDA, all in one place."""

from __future__ import annotations

import ctypes
import os

import torch

# malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD and M_MMAP_MAX, in bytes and in blocks.
_MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 1 << 26, -3: 1 << 30, -4: 0}


def device_type() -> str:
    """`cuda` where torch sees a CUDA device, otherwise `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def distributed_backend() -> str:
    """The torch.distributed backend that goes with `device_type`."""
    return "nccl" if device_type() == "cuda" else "gloo"


def prepare_environment() -> None:
    """Set up a training process; call before importing DeepSpeed."""
    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc to keep what torch frees, for the next step to use again.

    By default it returns large blocks to the kernel, and every training step begins with hundreds
    of thousands of page faults: half a second of a two-second step. No effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


def prepare_deepspeed() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory collective at start-up.

    `init_distributed` (0.19.8, comm/torch.py) builds the operator with g++ on every rank, for a
    minute or more, and a process killed meanwhile leaves a lock on which every later run waits.
    gloo does the same work. The table of operators that can be built has no other reader; DeepSpeed
    fills it when it is first asked for, with a compiler, for a third of a second.
    """
    if device_type() == "cpu":
        import deepspeed

        deepspeed.ops.__compatible_ops__ = {}


def let_megatron_run_on_cpu() -> None:
    """Make `torch.cuda.current_device()` answer on a machine without CUDA.

    Megatron-Core (0.16.1, tensor_parallel/mappings.py and layers.py) uses the value only as the
    `device=` of buffers for sequence parallelism; there is no public option.
    """
    if device_type() == "cpu":
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
