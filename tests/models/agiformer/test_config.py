"""Settings that cannot be, in one line with the value, the constraint and the remedy."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from models.agiformer.model import FAMILY, set_plasticity
from models.base import TokenInputs
from parallel.context import Axis, ParallelContext
from tests.models.agiformer.cases import config_of, model_of, text_of
from tests.refusals import assert_refused

CONTRADICTIONS = [
    ({"num_heads": 5}, ("hidden_size", 32, "num_heads=5", "change")),
    ({"num_heads": 32}, ("num_heads", 32, "1 dimension", "even")),
    ({"patch_kernel": 3}, ("patch_kernel", 3, "patch_size=4", "patch_kernel")),
]
WRONG = [
    ({"plasticity": 0.0}, "plasticity\n.*greater than 0"),
    ({"plasticity": 1.01}, "plasticity\n.*less than or equal to 1"),
    ({"thinking_steps": 0}, "thinking_steps\n.*greater than 0"),
    ({"window_size": 0}, "window_size\n.*greater than 0"),
    ({"decay_floor": 1.0}, "decay_floor\n.*less than 1"),
    ({"byte_head": "gru"}, "byte_head\n.*'causal' or 'independent'"),
    ({"memry": "none"}, "memry\n.*not permitted"),
]


@pytest.mark.parametrize(("changes", "parts"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(changes, parts):
    with assert_refused(*parts):
        config_of(**changes)


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValidationError, match=message):
        config_of(**changes)


def _schema(ctx: ParallelContext, seq_length: int):
    return FAMILY.carry_schema(config_of(), ctx, micro_batch_size=1, seq_length=seq_length)


def test_rows_that_are_no_whole_patches_are_refused_before_a_run():
    with assert_refused("sequence_length", value=30, constraint="patch_size=4", remedy="28"):
        _schema(ParallelContext.single(), 30)
    two = ParallelContext(tensor=Axis(2, 0), sequence_parallel=True)
    with assert_refused(
        "sequence_length", value=28, constraint="patch_size=4 x parallel.tensor=2", remedy="24"
    ):
        _schema(two, 28)
    assert _schema(two, 32).hidden.shape == (4, 1, 32)


def test_channels_that_tensor_ranks_cannot_share_are_refused():
    ctx = ParallelContext(tensor=Axis(3, 0), device=torch.device("meta"))
    spec = FAMILY.layer_specs(config_of())[0]
    with assert_refused("byte_dim", value=16, constraint="parallel.tensor=3", remedy="tensor size"):
        spec.module(ctx=ctx, **spec.kwargs)
    assert config_of(byte_dim=None).tensor_divisible()["byte_dim"] == 32


def test_plasticity_is_no_setting_of_the_function_since_the_weights_hold_it():
    assert config_of(plasticity=0.2).function() == config_of().function()
    model, other = model_of(config_of(plasticity=0.2)), model_of(config_of())
    text = TokenInputs(text_of(40))
    assert not torch.equal(model(text).logits, other(text).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(text).logits, other(text).logits)
    set_plasticity(other, 0.3)
    assert not torch.equal(model(text).logits, other(text).logits)
    assert type(config_of()).changeable_settings == {"plasticity"}


def test_the_memory_can_be_left_out():
    config = config_of(memory="none", fusion="triple")
    model = model_of(config)
    assert not any("memory" in name for name, _ in model.named_parameters())
    assert sum(p.numel() for p in model.parameters()) == FAMILY.num_parameters(config)
    assert model(TokenInputs(text_of(9))).logits.shape == (9, 1, 61)
