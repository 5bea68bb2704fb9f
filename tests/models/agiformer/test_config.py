"""Settings that cannot be, in one line with the value, the constraint and the remedy."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from models.agiformer.model import FAMILY, set_plasticity
from models.base import TokenInputs
from parallel.context import Axis, ParallelContext
from tests.models.agiformer.cases import config_of, model_of, text_of

WRONG = [
    ({"num_heads": 5}, "hidden_size=32 is not a multiple of num_heads=5; change one of them"),
    ({"num_heads": 32}, "gives heads of 1 dimensions, .*; make it even"),
    ({"patch_kernel": 3}, "patch_kernel=3 is smaller than patch_size=4, .*; raise patch_kernel"),
    ({"plasticity": 0.0}, "plasticity\n.*greater than 0"),
    ({"plasticity": 1.01}, "plasticity\n.*less than or equal to 1"),
    ({"thinking_steps": 0}, "thinking_steps\n.*greater than 0"),
    ({"window_size": 0}, "window_size\n.*greater than 0"),
    ({"decay_floor": 1.0}, "decay_floor\n.*less than 1"),
    ({"byte_head": "gru"}, "byte_head\n.*'causal' or 'independent'"),
    ({"memry": "none"}, "memry\n.*not permitted"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValidationError, match=message):
        config_of(**changes)


def _schema(ctx: ParallelContext, seq_length: int):
    return FAMILY.carry_schema(config_of(), ctx, micro_batch_size=1, seq_length=seq_length)


def test_rows_that_are_no_whole_patches_are_refused_before_a_run():
    with pytest.raises(
        ValueError, match=r"sequence_length=30 is no multiple of patch_size=4; use 28"
    ):
        _schema(ParallelContext.single(), 30)
    two = ParallelContext(tensor=Axis(2, 0), sequence_parallel=True)
    with pytest.raises(ValueError, match=r"=28 is no multiple of patch_size=4 x parallel.tensor=2"):
        _schema(two, 28)
    assert _schema(two, 32).hidden.shape == (4, 1, 32)


def test_channels_that_tensor_ranks_cannot_share_are_refused():
    ctx = ParallelContext(tensor=Axis(3, 0), device=torch.device("meta"))
    spec = FAMILY.layer_specs(config_of())[0]
    with pytest.raises(ValueError, match=r"byte_dim=16 is not divisible by parallel\.tensor=3"):
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
