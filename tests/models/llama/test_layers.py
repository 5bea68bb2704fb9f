from __future__ import annotations

import math

import pytest
import torch

from models.base import TokenInputs
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import Axis, ParallelContext
from tests.models.llama.test_config import SIZES
from tests.refusals import assert_refused

CTX = ParallelContext.single()


def _model(*, segmented: bool = False, **changes) -> SequentialModel:
    config = LlamaConfig(**(SIZES | changes))
    return SequentialModel(FAMILY.layer_specs(config, segmented=segmented), CTX)


def test_weights_start_with_the_standard_deviations_of_their_kind():
    model = _model(hidden_size=256, intermediate_size=512, vocab_size=2048, num_layers=8)
    expected = {"embedding.tokens.weight": 0.02, "head.output.weight": 0.02}
    for kind in ("attention.query", "attention.key", "mlp.gate", "mlp.up"):
        expected[f"block_7.{kind}.weight"] = 0.02
    for kind in ("attention.output", "mlp.down"):
        expected[f"block_7.{kind}.weight"] = 0.02 / math.sqrt(16)
    for name, std in expected.items():
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.05), name
    assert (model.get_parameter("block_0.mlp_norm.weight") == 1.0).all()


def test_a_tied_head_is_the_embedding():
    model = _model(tie_embeddings=True)
    head = model.get_parameter("head.output.weight")
    assert head is model.get_parameter("embedding.tokens.weight")


@pytest.mark.parametrize("segmented", [False, True])
def test_a_model_refuses_inputs_of_the_other_kind(segmented):
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    segments = None if segmented else torch.zeros(1, 4, dtype=torch.int32)
    with assert_refused("segmented", value=segmented, constraint="segment_ids", remedy="build"):
        _model(segmented=segmented)(TokenInputs(tokens, segments))


def test_a_cache_longer_than_the_positions_is_refused():
    with assert_refused(
        "position", value=128, constraint="max_position_embeddings=128", remedy=("shorten", "raise")
    ):
        _model().new_cache(1, 129)


def test_the_loss_is_the_mean_over_scored_tokens():
    config = LlamaConfig(**SIZES)
    logits = torch.randn(5, 2, 64)
    labels = torch.randint(0, 64, (2, 5))
    labels[0, 2:] = -100
    losses = FAMILY.token_losses(logits, labels, CTX)
    scored = labels.T != -100
    assert (losses[~scored] == 0).all()
    expected = -logits.log_softmax(-1)[scored].gather(-1, labels.T[scored][:, None])
    total, terms = FAMILY.loss(logits, labels, config=config, ctx=CTX)
    torch.testing.assert_close(total, expected.mean())
    assert terms == {"lm_loss": total}


def test_a_micro_batch_without_scored_tokens_has_loss_and_gradient_zero():
    logits = torch.randn(5, 2, 64, requires_grad=True)
    labels = torch.full((2, 5), -100)
    total = FAMILY.loss(logits, labels, config=LlamaConfig(**SIZES), ctx=CTX).total
    total.backward()
    assert total == 0
    assert (logits.grad == 0).all()


def test_the_carry_is_cut_over_the_sequence_under_sequence_parallelism():
    config = LlamaConfig(**SIZES)
    ctx = ParallelContext(tensor=Axis(size=2), sequence_parallel=True)
    schema = FAMILY.carry_schema(config, ctx, micro_batch_size=3, seq_length=16, segmented=True)
    assert schema.hidden.shape == (8, 3, 32)
    assert schema.positions.shape == (3, 16)
    with assert_refused(
        "sequence_length", value=15, constraint="parallel.tensor=2", remedy="change"
    ):
        FAMILY.carry_schema(config, ctx, micro_batch_size=3, seq_length=15)
