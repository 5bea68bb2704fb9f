"""Memory in the cross-attention of a decoder: a history of its own, over the encoder's keys."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import models.amrpa as amrpa
from models.amrpa import get_amrpa_loss, inject_amrpa
from tests.models.amrpa.tiny import injected, inputs, plain
from tests.tolerance import assert_close, rounding

PAIRS = ("t5", "bart")
BOUND = rounding(torch.float32, depth=32, length=64)
CROSS = {"t5": "EncDecAttention.amrpa.", "bart": "encoder_attn.amrpa."}


def _gradients(name: str, *, checkpointing: bool = False, **settings):
    model = injected(name, inject_cross_attention=True, **settings).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = model(**inputs(name), use_cache=False).logits
    (logits.square().mean() + get_amrpa_loss(model)).backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _compare(found, expected) -> None:
    assert_close(found[0], expected[0], BOUND)
    assert found[1].keys() == expected[1].keys()
    for parameter, gradient in expected[1].items():
        assert_close(found[1][parameter], gradient, BOUND, parameter, floor=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_patterns_over_the_encoder_are_transported_and_every_parameter_learns(name):
    settings = {"memory_noise": 0.0, "detach_history": False}
    found = _gradients(name, **settings)
    _compare(found, _gradients(name, **settings, history_kind="pattern"))
    _compare(found, _gradients(name, **settings, checkpointing=True))
    crossing = {n: g for n, g in found[1].items() if CROSS[name] in n}
    assert {n.split(".amrpa.")[1].split(".")[0] for n in crossing} == {"1", "2"}
    assert all(gradient.abs().max() > 0 for gradient in crossing.values())


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_a_model_begins_unchanged_decodes_with_a_cache_and_is_saved(name, tmp_path):
    model, given = plain(name), inputs(name)
    before = model(**given).logits
    config = amrpa.AMRPAConfig(inject_cross_attention=True, target_layers="decoder:all")
    inject_amrpa(model, config)
    assert torch.equal(model(**given).logits, before)

    model = injected(name, inject_cross_attention=True).eval()
    whole = model(**given).logits
    shorter = dict(given)
    tokens = shorter.pop("decoder_input_ids")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    cache = EncoderDecoderCache(*caches)
    parts = [
        model(**shorter, decoder_input_ids=part, past_key_values=cache, use_cache=True).logits
        for part in tokens.split([4, 1, 1, 4], dim=1)
    ]
    assert_close(torch.cat(parts, dim=1), whole, BOUND)
    for parameter_name, parameter in model.named_parameters():  # it is used
        if CROSS[name] in parameter_name and parameter_name.endswith("memory_weight"):
            parameter.zero_()
    assert not torch.allclose(model(**given).logits, whole, rtol=1e-3)
    model.save_pretrained(tmp_path)
    again = amrpa.from_pretrained(tmp_path)
    assert torch.equal(again(**given).logits, model(**given).logits)


def test_a_model_without_cross_attention_is_refused():
    for name, targets in (("llama", "all"), ("t5", "encoder:all")):
        settings = amrpa.AMRPAConfig(inject_cross_attention=True, target_layers=targets)
        with pytest.raises(ValueError, match="inject_cross_attention=True"):
            inject_amrpa(plain(name), settings)
