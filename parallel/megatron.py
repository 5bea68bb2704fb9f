"""The only module that imports megatron.core: collectives and products at tensor size > 1.

Importing it imports Megatron-Core (seconds), so it is imported only at tensor size > 1.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cpu.collector import imports_uncollected
from parallel.cpu.compat import let_megatron_run_on_cpu

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _without_broken_transformer_engine() -> Iterator[None]:
    """Let Megatron-Core go on without a Transformer Engine that is installed and cannot be loaded.

    It catches ImportErrors alone (0.16.1, tensor_parallel/layers.py and random.py), whereas a
    missing library of CUDA is an OSError, and a package without its extensions a RuntimeError.
    """
    name = "transformer_engine"
    try:
        importlib.import_module(f"{name}.pytorch")
    except ImportError:
        yield
    except Exception as error:
        logger.warning("Transformer Engine cannot be loaded and is not used: %s", error)
        found = {key: module for key, module in sys.modules.items() if key.startswith(name)}
        for key in found:
            del sys.modules[key]
        sys.modules[name] = None  # type: ignore[assignment]  # whose import is an ImportError
        try:
            yield
        finally:
            del sys.modules[name]
    else:
        yield


with imports_uncollected(), warnings.catch_warnings(), _without_broken_transformer_engine():
    # Megatron-Core warns about missing optional packages (Transformer Engine, Apex).
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers as _layers
    from megatron.core.tensor_parallel import mappings as _mappings

gather_from_sequence_region = _mappings.gather_from_sequence_parallel_region


def prepare_megatron() -> None:
    """Set up what Megatron-Core's tensor-parallel functions need of its global state.

    That is one buffer (0.16.1). All of them are called with a group, so that `parallel_state`,
    which would create 20 more process groups, is not initialised.
    """
    let_megatron_run_on_cpu()
    # The warning about CUDA_DEVICE_MAX_CONNECTIONS concerns speed on CUDA only, where we set it.
    _layers.linear_with_grad_accumulation_and_async_allreduce.warned = True
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def column_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
) -> Tensor:
    """`x W^T + b` with W sharded over its rows; the input gradient is reduced asynchronously."""
    return _layers.linear_with_grad_accumulation_and_async_allreduce(
        x,
        weight,
        bias,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=not sequence_parallel,
        sequence_parallel=sequence_parallel,
        tp_group=group,
    )


def copy_to_tensor_region(x: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Identity in forward; in backward an all-reduce of the gradient over tensor ranks.

    Ours, because Megatron-Core 0.16.1 (mappings.py, `_reduce`) returns a non-contiguous gradient
    unreduced, and reduces others in place although autograd may share them with another operation.
    """
    return _CopyToTensorRegion.apply(x, group)


class _CopyToTensorRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def reduce_from_tensor_region(x: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Sum partial results over tensor ranks, overwriting a contiguous x; identity in backward.

    Megatron-Core 0.16.1 returns a non-contiguous input unreduced (mappings.py, `_reduce`).
    """
    return _mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), group=group)


def reduce_scatter_to_sequence_region(x: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Sum partial results and keep this rank's part of dim 0; all-gather in backward."""
    return _mappings.reduce_scatter_to_sequence_parallel_region(x.contiguous(), group=group)
