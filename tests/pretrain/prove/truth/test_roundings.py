"""Roundings of a model are counted along its longest chain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.base import TokenInputs
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.prove.truth.roundings import roundings_in_a_row
from tests.models.families import CASES


class Applied(nn.Module):
    """A function of the input and of a matrix."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.eye(4))

    def forward(self, x):
        return self.function(x, self.weight)


CHAINS = {
    "a product and an activation": (lambda x, w: F.gelu(x @ w), 2),
    "the longer of two branches": (lambda x, w: (x @ w @ w).exp() + x @ w, 4),
    "views and copies round nothing": (lambda x, w: torch.cat([x.T, x.T]).contiguous().view(-1), 0),
    "wider results are rounded once, at their end": (
        lambda x, w: (x.float().exp() * 2.0).sum(0).to(x.dtype), 1,
    ),
    "in place": (lambda x, w: x.clone().mul_(3.0).add_(1.0), 2),
    "nothing": (lambda x, w: x, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_results_of_bf16_count_in_their_order(name):
    function, expected = CHAINS[name]
    assert roundings_in_a_row(Applied(function), torch.randn(4, 4).bfloat16()) == expected


def test_a_block_of_llama_rounds_thirteen_times():
    """Norm, query, rotation (2), attention, output and residual; norm, gate, its activation,
    product, down and residual."""
    family, config = CASES["llama"]

    def roundings(num_layers: int) -> int:
        specs = family.layer_specs(config.model_copy(update={"num_layers": num_layers}))
        model = SequentialModel(specs, ParallelContext.single())
        found = roundings_in_a_row(model, TokenInputs(torch.arange(16).view(1, 16)))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return found

    assert roundings(3) - roundings(2) == 13
