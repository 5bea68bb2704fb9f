"""Outputs of the layers in every mode, and generation on tensor ranks."""

from __future__ import annotations

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.agiformer.model import FAMILY
from models.base import TokenInputs
from models.generate import generate
from parallel.carry import SequentialModel, check_carry
from parallel.context import ParallelContext
from parallel.precision import Precision
from tests.distributed import run_ranks
from tests.equivalence import build
from tests.models.agiformer.cases import THINKING, config_of, text_of

VARIANTS = [{}, {"fusion": "triple"}, {"memory": "none"}, {"halting": "none"}, {"dropout": 0.0}]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_bf16_layers_keep_the_declared_carry_in_training_and_in_evaluation(changes, segmented):
    """A pipeline has the same wire for both, so dropout's keys travel where nothing is dropped."""
    config, ctx = config_of(**changes), ParallelContext.single(precision=Precision("bf16"))
    model = SequentialModel(FAMILY.layer_specs(config, segmented=segmented), ctx).bfloat16()
    options = {"micro_batch_size": 2, "seq_length": 32, "segmented": segmented}
    schema = FAMILY.carry_schema(config, ctx, **options)
    text = text_of(32, batch=2)
    ids = torch.zeros(2, 32, dtype=torch.int32) if segmented else None
    for is_training in (True, False):
        carry = TokenInputs(text, ids)
        for spec, layer in zip(model.specs[:-1], model.train(is_training).layers, strict=False):
            carry = layer(carry)
            check_carry(spec.name, carry, schema)
        output = model.layers[-1](carry)
        total, _ = FAMILY.loss(output, text, config=config, ctx=ctx)
        total.backward()
        assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_dropout_acts_in_training_alone():
    model = SequentialModel(FAMILY.layer_specs(config_of(dropout=0.5)), ParallelContext.single())
    other = SequentialModel(FAMILY.layer_specs(config_of(dropout=0.0)), ParallelContext.single())
    text = TokenInputs(text_of(40))
    assert torch.equal(model.eval()(text).logits, other(text).logits)
    assert not torch.equal(model.train()(text).logits, other(text).logits)


@pytest.mark.parametrize("width", [64, 256])
def test_a_byte_of_the_patch_weighs_at_first_as_much_as_the_latent(width):
    config = config_of(hidden_size=width, num_heads=4, head_hidden=128)
    head = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).head
    latents = torch.randn(512, width, generator=torch.Generator().manual_seed(0))
    of_latent, of_byte = head.project(latents).std(), head.table.std()
    assert 0.9 < of_byte / of_latent < 1.1


def _generated(ctx: ParallelContext | None = None) -> torch.Tensor:
    ctx = ctx or ParallelContext.from_world(tensor=2)
    specs = FAMILY.layer_specs(config_of(num_layers=2, **THINKING))
    model = build(specs, ctx, seed=5, noise=0.2).eval().double()
    return generate(model, text_of(10, batch=2), max_new_tokens=19)


def test_two_tensor_ranks_generate_the_text_of_one():
    alone = _generated(ParallelContext.single())
    for found in run_ranks(_generated, 2):
        assert torch.equal(found, alone)
