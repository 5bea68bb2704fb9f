"""The check of a model's layers on the meta device, before anything large is built."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from parallel.carry import Field, LayerSpec, SequentialModel, check_layers
from parallel.context import ParallelContext
from tests.refusals import assert_refused


class Inputs(NamedTuple):
    tokens: Tensor
    segments: Tensor | None = None


class Carry(NamedTuple):
    hidden: Tensor | Field


SCHEMA = Carry(Field((2, 3), torch.float32, gradient=True))


class Embedding(nn.Module):
    def __init__(self, *, ctx: ParallelContext) -> None:
        super().__init__()

    def forward(self, inputs: Inputs) -> Carry:
        return Carry(inputs.tokens.float())


class Block(nn.Module):
    """Adds a row to its carry where `grows`; counts its calls."""

    calls: ClassVar[list[bool]] = []

    def __init__(self, *, grows: bool, ctx: ParallelContext) -> None:
        super().__init__()
        self.grows = grows

    def forward(self, carry: Carry) -> Carry:
        self.calls.append(self.grows)
        return Carry(torch.cat((carry.hidden, carry.hidden[:1]))) if self.grows else carry


class Head(nn.Module):
    def __init__(self, *, ctx: ParallelContext) -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def _no_calls():
    Block.calls.clear()


def _model(*grows: bool) -> SequentialModel:
    blocks = [LayerSpec(f"block_{i}", Block, {"grows": g}) for i, g in enumerate(grows)]
    specs = [LayerSpec("embedding", Embedding), *blocks, LayerSpec("head", Head)]
    return SequentialModel(specs, ParallelContext.single(device="meta"))


def test_layers_of_equal_arguments_run_once_and_the_last_ones_carry_is_returned():
    carry = check_layers(_model(*[False] * 80), Inputs(torch.zeros(2, 3)), SCHEMA)
    assert Block.calls == [False]
    assert carry.hidden.is_meta
    assert carry.hidden.shape == (2, 3)


@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_layer_of_other_arguments_runs_wherever_it_is(position):
    model = _model(*[i == position for i in range(4)])
    with assert_refused(
        f"block_{position}, carry field hidden", "float32[3, 3]", "float32[2, 3]", "schema"
    ):
        check_layers(model, Inputs(torch.zeros(2, 3)), SCHEMA)


def test_a_layer_of_the_class_of_the_first_one_runs():
    """The first layer takes the inputs, any other a carry."""
    specs = [LayerSpec(name, Embedding) for name in ("embedding", "again")]
    model = SequentialModel(
        [*specs, LayerSpec("head", Head)], ParallelContext.single(device="meta")
    )
    with pytest.raises(AttributeError, match="tokens"):
        check_layers(model, Inputs(torch.zeros(2, 3)), SCHEMA)
