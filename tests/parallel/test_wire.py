"""The wire: bits, gradients and errors, without a process group."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from models.base import TokenInputs
from parallel.carry import Field, SequentialModel, Varying
from parallel.context import ParallelContext
from parallel.wire import Wire
from tests.models import awkward
from tests.refusals import assert_refused

CONFIG = awkward.AwkwardConfig()


def _schema(ctx):
    return awkward.carry_schema(CONFIG, ctx, micro_batch_size=2, seq_length=16)


def _run(cuts: tuple[int, ...], recompute: bool = False):
    """Loss, terms and gradients of the awkward model, crossing the wire before each cut layer."""
    ctx = ParallelContext.single()
    specs = awkward.layer_specs(CONFIG)
    model = SequentialModel(specs, ctx, seed=3)
    wire = Wire(_schema(ctx))
    tokens, labels = awkward.batch(0)
    carry = TokenInputs(tokens)
    for index, layer in enumerate(model.layers):
        if index in cuts:
            sent = wire.pack(carry, layer=specs[index - 1].name)
            received = tuple(_Hop.apply(t) if t.is_floating_point() else t.clone() for t in sent)
            carry = wire.unpack(received)
        carry = layer(carry)
    loss, _ = awkward.loss(carry, labels, config=CONFIG, ctx=ctx)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


class _Hop(torch.autograd.Function):
    """A copy through another buffer in both directions, as a send and a receive would make."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (4,), (5,), (6,), (7,), (1, 2, 3, 4, 5, 6, 7)])
def test_a_cut_before_any_layer_changes_neither_loss_nor_any_gradient(cuts):
    loss, gradients = _run(())
    cut_loss, cut_gradients = _run(cuts)
    assert torch.equal(loss, cut_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, cut_gradients[name]), name


def test_every_dtype_arrives_bit_for_bit_and_its_gradient_returns():
    schema = awkward.AwkwardCarry(
        hidden=Field((3, 5), torch.bfloat16, gradient=True),
        state=Field((7,), torch.float32, gradient=True),
        ids=Field((3,), torch.int64),
        flags=Field((5,), torch.bool),
        noise=Field((3,), torch.float64),
        aux=Field((), torch.float16, gradient=True),
    )
    carry = awkward.AwkwardCarry(
        torch.randn(3, 5).bfloat16().requires_grad_(),
        torch.tensor([0.0, -0.0, 1e-42, float("inf"), -1.5, 3.0, 7.0]).requires_grad_(),
        torch.tensor([-(2**62), 0, 2**62 + 1]),
        torch.tensor([True, False, True, True, False]),
        torch.randn(3, dtype=torch.float64),
        torch.tensor(2.5, dtype=torch.float16).requires_grad_(),
    )
    wire = Wire(schema)
    sent = wire.pack(carry, layer="any")
    assert [t.dtype for t in sent] == [torch.float32, torch.int32]
    arrived = wire.unpack(sent)
    for name, before, after in zip(schema._fields, carry, arrived, strict=True):
        assert before.dtype == after.dtype, name
        assert torch.equal(before, after), name
    gradients = [torch.randn_like(x) for x in (carry.hidden, carry.state, carry.aux)]
    torch.autograd.backward([arrived.hidden, arrived.state, arrived.aux], gradients)
    for x, gradient in zip((carry.hidden, carry.state, carry.aux), gradients, strict=True):
        assert torch.equal(x.grad, gradient)


def test_fields_without_gradient_cost_no_bytes_in_backward():
    ctx = ParallelContext.single()
    wire = Wire(_schema(ctx))
    differentiable = 4 * (16 * 2 * awkward.HIDDEN + 16 * 2 * awkward.STATE) + 16  # aux is padded
    assert wire.backward_bytes == differentiable
    assert wire.forward_bytes == differentiable + 16 * 2 * (8 + 1 + 4)


def test_a_carry_field_of_another_dtype_is_refused_with_layer_and_field():
    ctx = ParallelContext.single()
    wire = Wire(_schema(ctx))
    tokens, _ = awkward.batch(0)
    carry = awkward.Embedding(ctx=ctx)(TokenInputs(tokens))
    wrong = carry._replace(state=carry.state.double())
    with assert_refused(
        "carry field state",
        value="float64[16, 2, 8]",
        constraint="expected float32",
        remedy="carry schema",
    ):
        wire.pack(wrong, layer="block_3")


class _Growing(NamedTuple):
    hidden: Any
    past: Any


def test_a_field_that_varies_has_at_each_boundary_what_its_schema_says():
    one, other = Field((3, 2), torch.bfloat16), Field((5,), torch.float32, gradient=True)
    hidden = Field((2, 4), torch.float32, gradient=True)
    schema = _Growing(hidden, Varying({"block_1": (one, other)}))
    past = (torch.randn(3, 2).bfloat16(), torch.randn(5).requires_grad_())
    sent = _Growing(torch.randn(2, 4).requires_grad_(), past)
    arrived = (wire := Wire(schema, after="block_1")).unpack(wire.pack(sent, layer="block_1"))
    assert torch.equal(arrived.hidden, sent.hidden)
    assert [torch.equal(a, b) for a, b in zip(arrived.past, past, strict=True)] == [True, True]
    arrived.past[1].sum().backward()
    assert torch.equal(past[1].grad, torch.ones(5))

    nothing = Wire(schema, after="block_2")
    assert nothing.forward_bytes == 4 * 8 < wire.forward_bytes
    assert nothing.unpack(nothing.pack(sent._replace(past=()), layer="block_2")).past == ()
    with pytest.raises(ValueError, match=r"block_2, .* past: got 2, .* 0 tensors"):
        nothing.pack(sent, layer="block_2")
    wrong = sent._replace(past=(past[0].float(), past[1]))
    with pytest.raises(ValueError, match=r"block_1, .* past\[0\]: got float32.* bfloat16"):
        wire.pack(wrong, layer="block_1")


def test_an_integer_field_cannot_ask_for_a_gradient():
    fields = _schema(ParallelContext.single())
    with assert_refused(
        "carry field ids", value="int64[2, 16]", constraint="gradient", remedy="gradient=False"
    ):
        Wire(fields._replace(ids=Field((2, 16), torch.int64, gradient=True)))
