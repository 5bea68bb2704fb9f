"""The memory of the layers that one attention module serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.amrpa.memory import Measured, QueryMemory


class Corrected(NamedTuple):
    """`query`: what to add to the query before its rotation [b, n, s, d]."""

    query: Tensor
    measured: Measured


class Memories(nn.Module):
    """The memory of every layer whose attention is this one: several where layers share it.

    A module that is called, and no nn.ModuleDict, so that PEFT can train and save it as a whole:
    `modules_to_save=["amrpa"]`.
    """

    def __init__(self, memories: Mapping[int, QueryMemory]) -> None:
        super().__init__()
        for layer, memory in memories.items():
            self.add_module(str(layer), memory)

    def forward(
        self,
        q: Tensor,
        transported: Tensor,
        mean_value: Tensor | None,
        real: Tensor | None,
        *,
        layer: int,
    ) -> Corrected:
        """q, `transported` and `mean_value` as for `QueryMemory`, `real` as for its `measure`.

        In training xi ~ U(0, 2) is drawn for the noise.
        """
        memory = self.get_submodule(str(layer))
        noise = None
        if mean_value is not None and memory.training:
            noise = 2 * torch.rand(transported.shape[:-1], device=q.device)
        correction = memory(q, transported, mean_value, noise)
        return Corrected(correction.query, memory.measure(correction, real))  # type: ignore[operator]
