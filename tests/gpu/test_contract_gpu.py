"""The contract of every family on a CUDA device; the oracle is the same model on the CPU."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs, logits_of
from parallel.carry import check_carry, leaves
from parallel.wire import Wire
from tests.equivalence import Measured, measure
from tests.gpu.device import (
    BATCH,
    DEVICE,
    SEED,
    SEQ,
    causal_model_of,
    context,
    model_of,
    tokens_of,
)
from tests.models.families import CASES, evaluated

CPU = torch.device("cpu")
FP32 = {"rtol": 1e-4, "atol": 1e-5}

every_family = pytest.mark.parametrize("name", CASES)
# A family that chooses tokens makes some choices the other way in bf16.
without_choices = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.family.causal_in_training]
)
# So does a router of experts, unless each token takes all of them.
ALL_EXPERTS = {"mixture": {"top_k": CASES["mixture"].config.num_experts}}


def _measure(name: str, device: torch.device, **options) -> Measured:
    family, config = CASES[name]
    inputs, labels = tokens_of(name, device)
    return measure(family, config, inputs, labels, context(device), seed=SEED, **options)


def _assert_equal(measured: Measured, expected: Measured) -> None:
    torch.testing.assert_close(measured.loss.cpu(), expected.loss.cpu(), **FP32)
    assert measured.gradients.keys() == expected.gradients.keys()
    for parameter, gradient in expected.gradients.items():
        torch.testing.assert_close(
            measured.gradients[parameter].cpu(),
            gradient.cpu(),
            **FP32,
            msg=lambda message, p=parameter: f"{p}: {message}",
        )


@every_family
@torch.no_grad()
def test_logits_equal_those_of_the_cpu(name):
    on_cpu, on_device = (
        logits_of(model_of(name, context(device))(tokens_of(name, device)[0]))
        for device in (CPU, DEVICE)
    )
    assert on_device.device.type == DEVICE.type
    torch.testing.assert_close(on_device.cpu(), on_cpu, **FP32)


@without_choices
@torch.no_grad()
def test_bf16_logits_follow_fp32_on_the_cpu_as_far_as_bf16_allows(name):
    changes = ALL_EXPERTS.get(name, {})
    expected = logits_of(model_of(name, context(CPU), **changes)(tokens_of(name, CPU)[0]))
    model = model_of(name, context(DEVICE, "bf16"), **changes)
    logits = logits_of(model(tokens_of(name, DEVICE)[0]))
    assert logits.dtype == torch.bfloat16
    error = (logits.float().cpu() - expected).norm() / expected.norm()
    assert error < 0.05  # bf16 keeps 8 bits (0.004), and errors add up over the layers


@every_family
def test_loss_and_every_gradient_equal_those_of_the_cpu(name):
    _assert_equal(_measure(name, DEVICE), _measure(name, CPU))


@every_family
def test_recomputation_and_stages_joined_by_the_wire_change_nothing(name):
    expected = _measure(name, DEVICE)
    _assert_equal(_measure(name, DEVICE, recompute=True), expected)
    _assert_equal(_measure(name, DEVICE, cuts=(1, 2, 3)), expected)


@every_family
@torch.no_grad()
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_changing_a_token_changes_no_earlier_logit_bit_for_bit(name, precision):
    model = causal_model_of(name, context(DEVICE, precision))
    tokens = tokens_of(name, DEVICE)[0].tokens
    before = logits_of(model(TokenInputs(tokens)))
    for position in range(1, SEQ):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % CASES[name].config.vocab_size
        after = logits_of(model(TokenInputs(changed)))
        assert torch.equal(before[:position], after[:position]), position
        assert not torch.equal(before[position], after[position]), position


@every_family
@torch.no_grad()
@pytest.mark.parametrize("lengths", [(10, 22), (7, 9, 16)])
def test_packed_documents_equal_separate_ones(name, lengths):
    ctx = context(DEVICE)
    packed, alone = (causal_model_of(name, ctx, segmented=packed) for packed in (True, False))
    tokens = tokens_of(name, DEVICE)[0].tokens
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    segments = segments.int().expand(BATCH, -1).contiguous().to(DEVICE)
    together = logits_of(packed(TokenInputs(tokens, segments))).split(list(lengths))
    for document, logits in zip(tokens.split(list(lengths), dim=1), together, strict=True):
        separate = logits_of(alone(TokenInputs(document.contiguous())))
        torch.testing.assert_close(logits, separate, **FP32)


@every_family
@torch.no_grad()
@pytest.mark.parametrize("chunks", [(SEQ,), (1,) * SEQ, (5, 1, 1, 9, 16)])
def test_cached_decoding_equals_the_full_forward_pass_in_any_chunks(name, chunks):
    tokens = tokens_of(name, DEVICE)[0].tokens
    model = evaluated(model_of(name, context(DEVICE)), tokens)
    whole = logits_of(model(TokenInputs(tokens)))
    cache = model.new_cache(BATCH, SEQ)
    parts = [
        logits_of(model(TokenInputs(part.contiguous()), cache))
        for part in tokens.split(list(chunks), dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, **FP32)


@every_family
def test_the_wire_carries_every_field_and_its_gradient_bit_for_bit(name):
    family, config = CASES[name]
    ctx = context(DEVICE, "bf16")
    schema = family.carry_schema(config, ctx, micro_batch_size=BATCH, seq_length=SEQ)
    wire, model = Wire(schema, after="block_0"), model_of(name, ctx)
    carry = model.layers[1](model.layers[0](tokens_of(name, DEVICE)[0]))
    arrived = wire.unpack(wire.pack(carry, layer="block_0"))
    check_carry("block_0", arrived, schema)
    for (_, field), (_, sent), (_, received) in zip(
        leaves(wire.schema), leaves(carry), leaves(arrived), strict=True
    ):
        assert received.device.type == DEVICE.type
        assert torch.equal(received, sent)
        if field.gradient and sent.requires_grad:  # losses may begin after this layer
            gradient = torch.randn(field.shape, device=DEVICE).to(field.dtype)
            (back,) = torch.autograd.grad(received, sent, gradient, retain_graph=True)
            assert torch.equal(back, gradient)
