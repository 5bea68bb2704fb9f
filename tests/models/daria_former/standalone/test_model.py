"""The model in one process: outputs, parts, and what it does not take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.common.int8 import quantize_int8
from models.daria_former import DariaFormerModel
from models.daria_former.carry import DariaInputs
from models.daria_former.emotion import EmotionExpressionLayer
from models.daria_former.standalone.generation import DariaGenerator
from models.daria_former.standalone.lora import LoRAManager
from tests.equivalence import build
from tests.models.daria_former.shrunk import shrunk
from tests.refusals import assert_refused

TOKENS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
MODALITIES = {
    "image_enabled": True,
    "image_size": 32,
    "audio_enabled": True,
    "audio_n_mels": 8,
    "audio_max_len": 64,
    "audio_conv_channels": 16,
}


def _model(**changes) -> DariaFormerModel:
    model = DariaFormerModel(shrunk(**changes))
    model.body = build(model.body.specs, model.body.ctx, seed=1, noise=0.3)
    return model.eval()


@torch.no_grad()
def test_outputs_are_those_of_the_family_batch_first():
    model = _model()
    outputs = model(TOKENS, return_emotion=True)
    own = model.body(DariaInputs(TOKENS))
    assert torch.equal(outputs["logits"], own.logits.transpose(0, 1))
    assert torch.equal(outputs["hidden_states"], own.hidden.transpose(0, 1))
    assert torch.equal(outputs["emotion_state"], own.emotion[-1])
    assert outputs["emotion_logits"].shape == (2, 8)
    assert set(model(TOKENS)) == {"logits", "hidden_states", "kv_cache"}


@torch.no_grad()
def test_the_emotion_state_that_is_given_is_continued():
    model = _model()
    given = torch.full((2, 16), 0.7)
    assert not torch.equal(model(TOKENS, emotion_state=given)["logits"], model(TOKENS)["logits"])
    zero = torch.zeros(2, 16)
    assert torch.equal(model(TOKENS, emotion_state=zero)["logits"], model(TOKENS)["logits"])


@torch.no_grad()
def test_a_refused_draft_leaves_no_trace():
    model = _model()
    cache, expected = model.new_cache(2, 64), model.new_cache(2, 64)
    model(TOKENS[:, :30], kv_cache=cache)
    model(TOKENS[:, :30], kv_cache=expected)
    model(TOKENS[:, 30:33] * 0 + 5, kv_cache=cache)
    model.rollback(cache, 30)
    for length in (1, 31):
        with pytest.raises(ValueError, match=f"back to {length}; at most segment_len=16"):
            model.rollback(cache, length)
    found = model(TOKENS[:, 30:], kv_cache=cache)["logits"]
    assert torch.equal(found, model(TOKENS[:, 30:], kv_cache=expected)["logits"])


def test_parts_are_where_they_were_published():
    model = _model(**MODALITIES)
    assert model.text_encoder(TOKENS).shape == (2, 40, 64)
    assert [type(site) for site in model.emotion] == [EmotionExpressionLayer] * 3
    assert len(model.layers) == 2
    assert model.rope is model.layers[1].attention.rotaries
    assert model.lm_head.weight is model.text_encoder.weight
    for part in ("image_encoder", "audio_encoder", "context_router", "final_norm", "rhythm"):
        assert isinstance(getattr(model, part), nn.Module), part
    plain = _model()
    assert plain.image_encoder is None
    assert plain.audio_encoder is None


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        model = _model().train()
        if enabled:
            model.gradient_checkpointing_enable()
        model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_bf16_is_near_fp32_with_and_without_a_cache():
    model = _model()
    expected = model(TOKENS)["logits"]
    model.bfloat16()
    cache = model.new_cache(2, 64)
    parts = [model(part, kv_cache=cache)["logits"] for part in TOKENS.split(13, dim=1)]
    for found in (model(TOKENS)["logits"], torch.cat(parts, dim=1)):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_int8_is_near_fp32_and_a_quarter_of_the_size():
    model = _model()
    expected = model(TOKENS)["logits"]
    quantized = quantize_int8(model)
    assert (quantized(TOKENS)["logits"] - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(model(TOKENS)["logits"], expected)
    weight = quantized.layers[0].attention.q_proj.weight()
    assert weight.dtype == torch.qint8
    assert 4 * weight.element_size() == model.layers[0].attention.q_proj.weight.element_size()
    rows = DariaGenerator(quantized).generate(TOKENS, max_new_tokens=5, do_sample=False)
    assert rows.shape == (2, 45)


def test_int8_of_what_cannot_be_quantised_is_refused():
    model = _model()
    with pytest.raises(ValueError, match="fp32 weights"):
        quantize_int8(_model().bfloat16())
    LoRAManager(model, rank=2).inject()
    with pytest.raises(ValueError, match="adapters"):
        quantize_int8(model)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": TOKENS[0]}, r"input_ids int64\[40\] must be"),
        ({"input_ids": torch.rand(1, 3)}, r"input_ids float32\[1, 3\] must be int64"),
        ({"input_ids": TOKENS[:, :0]}, r"input_ids int64\[2, 0\] must be"),
        ({"input_ids": TOKENS + 1}, "vocab_size=257 tokens from 0"),
        ({"input_ids": TOKENS - 100}, "vocab_size=257 tokens from 0"),
        ({"input_ids": TOKENS.repeat(1, 13)}, "520 .*max_seq_len=512"),
        ({"persona": torch.zeros(2, 3)}, r"persona .*\[2, 3\]"),
        ({"persona": torch.zeros(3, 16)}, r"persona .*\[3, 16\]"),
        ({"emotion_state": torch.zeros(16)}, r"emotion .*\[16\]"),
        ({"images": torch.zeros(2, 4, 32, 32)}, "image_channels"),
        ({"images": torch.zeros(2, 3, 30, 32)}, "image_patch_size=16"),
        ({"images": torch.zeros(2, 32, 32)}, r"images .*\[2, 32, 32\]"),
        ({"images": torch.zeros(1, 3, 32, 32)}, "batch 1 with 2 rows"),
        ({"audio": torch.zeros(2, 9, 30)}, "audio_n_mels"),
        ({"audio": torch.zeros(2, 8, 65)}, "audio_max_len=64"),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused(inputs, message):
    model = _model(**MODALITIES)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": TOKENS} | inputs)


@torch.no_grad()
def test_a_generation_ends_where_the_positions_do():
    model = _model(max_seq_len=64)
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        model.new_cache(2, 65)
    cache = model.new_cache(2, 64)
    model(TOKENS, kv_cache=cache)
    with assert_refused("text", value=65, constraint="max_seq_len=64", remedy="max_seq_len"):
        model(TOKENS[:, :25], kv_cache=cache)
    assert model(TOKENS[:, :24], kv_cache=cache)["logits"].isfinite().all()


def test_images_for_a_model_without_them_are_refused():
    with pytest.raises(ValueError, match="set image_enabled"):
        _model()(TOKENS, images=torch.zeros(2, 3, 32, 32))
