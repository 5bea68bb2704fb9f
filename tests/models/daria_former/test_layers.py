"""The layers at their start, and what follows from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import Axis, ParallelContext
from parallel.random import initialize
from parallel.sharding import Constant, init_of
from tests.models.daria_former.cases import MODALITIES, SUBSETS, config_of, model_of, tokens_of
from tests.refusals import assert_refused
from tests.tiers import spread

# What makes a block a plain one at first: whatever state, router and gates scale or add.
STARTS_AT_ZERO = (
    "attention_norm.scale", "attention_norm.shift", "ffn_norm.scale", "ffn_norm.shift",
    "attention_scale", "attention.gate.weight", "ffn.emotion", "ffn.emotion_bias", "fusion.gate",
    "rhythm.up", "rhythm.bias", "attention.paths.memory.segment_gain", "emotion.bias",
    "style", "category_style", "temperature", "rhythm.need", "rhythm.noise_up",
    "router.weight", "router.bias", "persona_projection", "image.bias", "first_bias", "second_bias",
)  # fmt: skip
TRAINED = SUBSETS | {
    "images and sound": MODALITIES,
    "adapters": {"lora_rank": 2, "lora_targets": ("q_proj", "k_proj", "o_proj", "down_proj")},
    "dropout": {"dropout": 0.2, "path_dropout": 0.3},
    "no noise": {"rhythm_noise_std": 0.0, "path_dropout": 0.0, "dropout": 0.0},
    "no sinks": {"num_global_tokens": 0},
    "only the cross entropy": {
        "gate_balance_weight": 0.0, "memory_loss_weight": 0.0, "emotion_loss_weight": 0.0,
        "repetition_loss_weight": 0.0, "rhythm_loss_weight": 0.0,
    },
}  # fmt: skip


def _at_zero(name: str) -> bool:
    return any(f".{name}".endswith(f".{part}") for part in STARTS_AT_ZERO)


@pytest.mark.parametrize(("tensor", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_what_must_start_at_zero_does_at_any_layout_and_whatever_memory_held_before(tensor, rank):
    """H13."""
    config = config_of(**MODALITIES, esv_sites=4)
    ctx = ParallelContext(tensor=Axis(size=tensor, rank=rank))
    found = set()
    for spec in FAMILY.layer_specs(config):
        layer = spec.module(ctx=ctx, **spec.kwargs)
        for parameter in layer.parameters():
            parameter.data.fill_(7.0)
        initialize(layer, seed=3, prefix=spec.name, tensor_rank=rank, names=dict(spec.tied))
        for name, parameter in layer.named_parameters():
            full = f"{spec.name}.{name}"
            constant = init_of(full, parameter) == Constant(0.0)
            assert constant == bool((parameter == 0).all()), full
            assert constant == _at_zero(full), full
            found |= {part for part in STARTS_AT_ZERO if full.endswith(part)}
    assert found == set(STARTS_AT_ZERO)


def test_a_model_on_the_meta_device_declares_the_same_starts():
    """H13."""
    config = config_of(**MODALITIES)
    for spec in FAMILY.layer_specs(config):
        real = spec.module(ctx=ParallelContext.single(), **spec.kwargs)
        meta = dict(
            spec.module(ctx=ParallelContext.single(device="meta"), **spec.kwargs).named_parameters()
        )
        for name, parameter in real.named_parameters():
            theirs, ours = init_of(name, meta[name]), init_of(name, parameter)
            assert meta[name].is_meta
            assert meta[name].shape == parameter.shape
            assert theirs == ours or getattr(theirs, "func", theirs) == getattr(ours, "func", ours)


@torch.no_grad()
def test_a_block_whose_fusion_skips_nothing_is_exactly_a_plain_pre_norm_block():
    """x + a + ffn(norm(x + a)), written with nothing of the block but its matrices."""
    config = config_of(
        paths=("long",), num_global_tokens=0, num_layers=1, esv_sites=1, num_kv_heads=4
    )
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).eval()
    block, carry = model.layers[1], model.layers[0](TokenInputs(tokens_of(20)))
    x, p = torch.randn(20, 1, 32), dict(block.named_parameters())
    carry = carry._replace(hidden=x, emotion=torch.rand_like(carry.emotion))

    def norm(y: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(y, y.shape[-1:], eps=config.norm_eps)

    def heads(name: str) -> torch.Tensor:
        return (norm(x) @ p[f"attention.{name}.weight"].T).view(20, 4, 8).transpose(0, 1)

    table = block.attention.rotaries.long.at(x.device, start=0, length=20)

    def turned(y: torch.Tensor) -> torch.Tensor:
        return norm(y) * table.cos + norm(y).roll(4, dims=-1) * table.sin

    q, k = turned(heads("q_proj")), turned(heads("paths.long.k_proj"))
    scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(20, 20).bool().tril(), -torch.inf)
    read = norm(scores.softmax(dim=-1) @ heads("paths.long.v_proj"))
    a = read.transpose(0, 1).reshape(20, 1, 32) @ p["attention.o_proj.weight"].T
    gate, up = (norm(x + a) @ p[f"ffn.{name}_proj.weight"].T for name in ("gate", "up"))
    plain = x + a + (F.silu(gate) * up) @ p["ffn.down_proj.weight"].T
    found = block(carry).hidden
    assert (found - plain).norm() / plain.norm() < 0.02
    block.fusion.bias[2] = -1e4
    torch.testing.assert_close(block(carry).hidden, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_stream_of_eighty_layers_grows_less_than_its_bound_and_is_finite_in_half_precision():
    """H8: RMS(x_L) / RMS(x_0) < 3 sqrt(L) from a stream of size 1."""
    config = config_of(num_layers=80, hidden_dim=64, initializer_range=0.02)
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).eval()
    inputs = TokenInputs(tokens_of(12))
    carry = model.layers[0](inputs)
    carry = carry._replace(hidden=F.rms_norm(torch.randn_like(carry.hidden), (64,)))
    for layer in model.layers[1:-1]:
        carry = layer(carry)
    assert carry.hidden.square().mean().sqrt() < 3 * 80**0.5
    for dtype in (torch.float16, torch.bfloat16):
        assert model.to(dtype)(inputs).logits.isfinite().all()


@pytest.mark.parametrize(("subset", "segmented"), spread(TRAINED, [False, True]))
def test_every_parameter_learns_whatever_is_switched_on(subset, segmented):
    """H15, of training with what it draws and in packed rows."""
    config = config_of(num_layers=2, **{"esv_sites": 2} | TRAINED[subset])
    model = model_of(config, segmented=segmented).train()
    tokens = tokens_of(25, batch=2)
    given = DariaInputs(tokens[:, :-1])
    if segmented:
        given = given._replace(segment_ids=(torch.arange(24) >= 13).int().expand(2, -1))
    if config.modality_enabled:
        given = given._replace(images=torch.randn(2, 3, 8, 8), audio=torch.randn(2, 4, 9))
    total, _ = FAMILY.loss(model(given), tokens[:, 1:], config=config, ctx=model.ctx)
    total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_path_is_given_up_without_what_protects_it():
    """H9: 150 steps on text that the window alone explains, no dropped paths and no balance."""
    config = config_of(
        num_layers=1, esv_sites=1, path_dropout=0.0, dropout=0.0, gate_balance_weight=0.0
    )
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        starts = torch.randint(0, 61, (8, 1), generator=generator)
        tokens = (starts + torch.arange(17) ** 2) % 61
        total, terms = FAMILY.loss(
            model(TokenInputs(tokens[:, :-1])), tokens[:, 1:], config=config, ctx=model.ctx
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert terms["lm_loss"] < 0.7
    assert all(terms[f"gate_{path}"] > 0.01 for path in config.all_paths)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            {"images": torch.zeros(2, 3, 8, 7)},
            ("images", [2, 3, 8, 7], "image_patch_size=4", "resize"),
        ),
        (
            {"images": torch.zeros(2, 3, 0, 8)},
            ("images", [2, 3, 0, 8], "image_patch_size=4", "resize"),
        ),
        (
            {"images": torch.zeros(2, 1, 8, 8)},
            ("images", [2, 1, 8, 8], "[batch, 3, height, width] (image_channels)", "convert"),
        ),
        ({"images": torch.zeros(3, 8, 8)}, ("image", 3, "2 rows", "every row")),
        ({"images": torch.zeros(1, 3, 8, 8)}, ("image", 1, "2 rows", "every row")),
        ({"audio": torch.zeros(2, 5, 9)}, ("audio", [2, 5, 9], "audio_n_mels", "mel")),
        ({"audio": torch.zeros(2, 4)}, ("audio", [2, 4], "audio_n_mels", "mel")),
        ({"audio": torch.zeros(2, 4, 10)}, ("audio", 10, "audio_max_len=9", "audio_max_len")),
        ({"audio": torch.zeros(2, 4, 0)}, ("audio", 0, "audio_max_len=9", "audio_max_len")),
        (
            {"persona": torch.zeros(2, 7)},
            ("persona", [2, 7], ("[2, 8]", "persona_dim"), "every row"),
        ),
        ({"persona": torch.zeros(8)}, ("persona", [8], ("[2, 8]", "persona_dim"), "every row")),
        (
            {"emotion": torch.zeros(3, 8)},
            ("emotion", [3, 8], ("[2, 8]", "emotion_dim"), "every row"),
        ),
        (
            {"emotion": torch.zeros(2, 9)},
            ("emotion", [2, 9], ("[2, 8]", "emotion_dim"), "every row"),
        ),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused(given, parts):
    model = model_of(config_of(num_layers=1, esv_sites=1, **MODALITIES))
    with assert_refused(*parts):
        model(DariaInputs(tokens_of(5, batch=2), **given))


@pytest.mark.parametrize("name", ["images", "audio", "persona"])
def test_inputs_that_a_model_does_not_have_are_refused(name):
    model = model_of(config_of(num_layers=1, esv_sites=1, paths=("local",)))
    with assert_refused(name, value="model", constraint="given", remedy="before building"):
        model(DariaInputs(tokens_of(5), **{name: torch.zeros(1, 3, 8, 8)[:, 0, 0]}))


@pytest.mark.parametrize("name", ["image", "audio"])
def test_a_modality_that_an_encoder_was_built_without_is_refused(name):
    other = {"image": "audio", "audio": "image"}[name]
    changes = {key: value for key, value in MODALITIES.items() if key.startswith(other)}
    model = model_of(config_of(num_layers=1, esv_sites=1, **changes))
    with assert_refused(f"{name} input", value=False, constraint="_enabled", remedy="=True"):
        model.layers[0].encoder(
            images=torch.zeros(1, 3, 8, 8) if name == "image" else None,
            audio=torch.zeros(1, 4, 5) if name == "audio" else None,
            batch=1,
        )


def test_a_document_beyond_the_range_is_refused_in_a_packed_row_and_a_longer_row_is_not():
    """H7."""
    model = model_of(config_of(num_layers=1, esv_sites=1, max_seq_len=16), segmented=True)
    tokens, whole = tokens_of(20), torch.zeros(1, 20, dtype=torch.int32)
    halves = (torch.arange(20) >= 10).int().view(1, 20)
    assert model(TokenInputs(tokens, halves)).logits.isfinite().all()
    with assert_refused(
        "position", value=19, constraint="max_position_embeddings=16", remedy=("shorten", "raise")
    ):
        model(TokenInputs(tokens, whole))
