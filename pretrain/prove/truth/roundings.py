"""Number of consecutive roundings in the forward pass of a model in bf16."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that round nothing, beside those whose results are views.
_EXACT = {
    *("_unsafe_view", "cat", "clone", "constant_pad_nd", "copy_", "embedding", "flip", "gather"),
    *("index", "index_put", "index_put_", "index_select", "masked_fill", "masked_fill_"),
    *("masked_select", "repeat", "roll", "scatter", "scatter_", "sort", "stack", "topk", "where"),
    *("abs", "max", "min", "neg", "relu", "new_zeros", "ones_like", "zero_", "zeros_like"),
}


@torch.no_grad()
def roundings_in_a_row(model: nn.Module, inputs: Any) -> int:
    """The longest chain of results that are rounded to bf16, from the inputs of a model to any of
    its results; of a copy of the model in bf16, which runs here."""
    rounded = copy.deepcopy(model).bfloat16()
    with torch.random.fork_rng(devices=()), _Chains() as chains:
        rounded(inputs)
    return chains.longest


class _Chains(TorchDispatchMode):
    """Knows of the memory of every tensor how many roundings in a row lead to it.

    A fused operation, such as attention, rounds once. Tensors are kept, so that no memory is used
    for two of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self._lengths: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        results = operation(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        before = max((self._lengths.get(_memory(x), 0) for x in given), default=0)
        is_exact = operation.is_view or operation.overloadpacket.__name__ in _EXACT
        widens = operation.overloadpacket.__name__ == "_to_copy" and not any(
            x.dtype in (torch.float32, torch.float64) for x in given
        )
        for result in _tensors(results):
            rounds = result.dtype == torch.bfloat16 and not (is_exact or widens)
            length = max(before + rounds, self._lengths.get(_memory(result), 0))
            self._lengths[_memory(result)] = length
            self._kept.append(result)
            self.longest = max(self.longest, length)
        return results


def _tensors(values: Any) -> list[Tensor]:
    """Those that have memory."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.numel()]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
