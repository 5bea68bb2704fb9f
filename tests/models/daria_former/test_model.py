"""The model against its equations, and the hazards of its parts."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.layers import DACBlock
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.wire import Wire
from pretrain.equivalence import build, run_cut
from tests.models.daria_former import oracle
from tests.models.families import CASES

BASE = CASES["daria_former"].config
SUBSETS = {
    "all text paths": {},
    "local only": {"paths": ("local",)},
    "long only, no sinks": {"paths": ("long",), "num_global_tokens": 0},
    "local and memory": {"paths": ("local", "memory")},
    "no persistent slots": {"persistent_memory_slots": 0},
    "persona and long": {"paths": ("long", "persona")},
    "one emotion site": {"esv_sites": 1},
    "gru": {"esv_mode": "gru"},
    "layer norm, gelu": {"norm_type": "layer", "ffn_activation": "gelu"},
    "relu, untied": {"ffn_activation": "relu", "weight_tying": False},
    "sigmoid gates": {"gate_type": "sigmoid"},
    "no qk norm, full rhythm": {"qk_norm": False, "rhythm_rank": 0},
    "stretched positions": {"rope_scaling_factor": 4.0},
}


def _config(**changes) -> DariaFormerConfig:
    return DariaFormerConfig.from_dict(BASE.to_dict() | changes)


def _build(config: DariaFormerConfig, **options) -> SequentialModel:
    specs = FAMILY.layer_specs(config, **options)
    return build(specs, ParallelContext.single(), seed=5, noise=0.2).eval()


def _tokens(length: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, BASE.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("subset", SUBSETS)
def test_logits_are_those_of_the_equations(subset):
    config = _config(**SUBSETS[subset])
    model = _build(config)
    parameters = dict(model.named_parameters())
    # Around the window (6), the stride (2), segments (4), and the capacity of both levels (10, 12).
    for length in (1, 4, 7, 23):
        tokens = _tokens(length)
        found = model(TokenInputs(tokens)).logits[:, 0].double()
        expected = oracle.logits(config, parameters, tokens[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_documents_of_a_row_are_those_of_the_equations():
    config = _config()
    model = _build(config, segmented=True)
    parameters, lengths = dict(model.named_parameters()), [9, 3, 13]
    tokens = _tokens(25)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int().unsqueeze(0)
    found = model(TokenInputs(tokens, segments)).logits[:, 0].double()
    for document, part in zip(tokens[0].split(lengths), found.split(lengths), strict=True):
        expected = oracle.logits(config, parameters, document)
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("given", [True, False])
def test_images_and_a_persona_are_read_as_the_equations_say(given):
    config = _config(image_enabled=True, image_size=8, image_patch_size=4)
    model, tokens = _build(config), _tokens(11)
    images = torch.randn(1, 3, 8, 8) if given else None
    persona = torch.randn(1, config.persona_dim)
    found = model(DariaInputs(tokens, images=images, persona=persona)).logits[:, 0].double()
    encoded = model.layers[0].encoder.image(images)[:, 0] if given else None
    expected = oracle.logits(
        config, dict(model.named_parameters()), tokens[0], modality=encoded, persona=persona[0]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_cross_the_wire_bit_for_bit_and_their_gradient_comes_back():
    config = _config(image_enabled=True, image_size=8, image_patch_size=4)
    inputs = DariaInputs(_tokens(11, batch=2), images=torch.randn(2, 3, 8, 8))
    gradients = []
    for cuts in ((), (1, 2, 3, 4, 5)):
        model = _build(config).train()
        schema = FAMILY.carry_schema(
            config, model.ctx, micro_batch_size=2, seq_length=11, num_modality_tokens=4
        )
        output = run_cut(model.specs, model, inputs, Wire(schema), cuts)
        FAMILY.loss(output, inputs.tokens, config=config, ctx=model.ctx).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())
    assert gradients[0]["embedding.encoder.image.projection"].abs().max() > 0


def test_encoders_without_images_are_refused_before_a_run():
    config = _config(image_enabled=True, image_size=8, image_patch_size=4)
    with pytest.raises(ValueError, match=r"image_enabled=True.* neither images nor sound"):
        FAMILY.carry_schema(config, ParallelContext.single(), micro_batch_size=2, seq_length=8)


@torch.no_grad()
@pytest.mark.parametrize("path", ["local", "long", "memory", "persona"])
def test_no_path_alone_sees_a_later_token(path):
    """With every head's gate on one path (H1)."""
    model = _build(_config(path_dropout=0.0))
    for layer in model.layers:
        if isinstance(layer, DACBlock):
            bias = layer.attention.gate_bias
            bias.copy_(torch.full_like(bias, -1e4))
            bias[:, layer.attention.config.all_paths.index(path)] = 1e4
    tokens = _tokens(24)
    before = model(TokenInputs(tokens)).logits
    for position in range(1, 24):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % BASE.vocab_size
        assert torch.equal(model(TokenInputs(changed)).logits[:position], before[:position])


@torch.no_grad()
def test_the_window_ends_where_it_says():
    """H6: token t - w is out of reach of a local path of window w, t - w + 1 is in it."""
    config = _config(paths=("local",), num_layers=1, esv_sites=1, sliding_window_size=5)
    model = _build(config)
    for layer in (model.layers[0].emotion, model.layers[1].emotion):
        layer.write_bias.fill_(-1e4)  # no emotion: it remembers on its own
    tokens = _tokens(16)
    before = model(TokenInputs(tokens)).logits
    changed = tokens.clone()
    changed[:, 4] += 1
    differs = (model(TokenInputs(changed)).logits != before).any(dim=-1)[:, 0]
    assert differs.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 4, 6, 9, 12, 17])
@pytest.mark.parametrize("taken_back", [1, 3, 4])
def test_a_rollback_is_as_if_the_tokens_had_never_been_seen(prompt, taken_back):
    """H16, at every kind of boundary."""
    model, tokens = _build(_config()), _tokens(30, batch=2)
    cache = model.new_cache(2, 64)
    refused = (tokens[:, prompt : prompt + taken_back] + 1) % BASE.vocab_size
    seen = torch.cat((tokens[:, :prompt], refused), dim=1)
    for token in seen.split(1, dim=1):
        model(TokenInputs(token), cache)
    for layer in cache.values():
        layer.rollback(prompt)
    rest = tokens[:, prompt:]
    again = torch.cat([model(TokenInputs(t), cache).logits for t in rest.split(1, dim=1)])
    whole = model(TokenInputs(tokens)).logits[prompt:]
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_random_chunks_decode_to_the_full_pass():
    """H3."""
    model, tokens = _build(_config()), _tokens(61, batch=2)
    whole = model(TokenInputs(tokens)).logits
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        sizes: list[int] = []
        while sum(sizes) < 61:
            draw = int(torch.randint(1, 14, (1,), generator=generator))
            sizes.append(min(draw, 61 - sum(sizes)))
        cache = model.new_cache(2, 61)
        parts = [model(TokenInputs(t), cache).logits for t in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_stream_of_a_deep_model_does_not_explode():
    """H8: what a fresh block writes has a size of its own, so the stream grows by at most a
    constant per layer (.02 of it the normalised skip), not by a factor; finite in bf16."""
    config = _config(num_layers=80, esv_sites=4, initializer_range=0.02)
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).eval()
    carry, sizes = model.layers[0](TokenInputs(_tokens(16))), []
    for layer in model.layers[1:-1]:
        carry = layer(carry)
        sizes.append(carry.hidden.square().mean().sqrt().item())
    assert sizes[79] < 0.025 * 80
    assert sizes[79] < 2.2 * sizes[39]
    assert model.bfloat16()(TokenInputs(_tokens(16))).logits.isfinite().all()


@pytest.mark.parametrize("subset", SUBSETS)
def test_every_parameter_learns_in_every_subset(subset):
    """H15."""
    config = _config(**SUBSETS[subset])
    model = _build(config).train()
    tokens = _tokens(25, batch=2)
    total, _ = FAMILY.loss(
        model(TokenInputs(tokens[:, :-1])), tokens[:, 1:], config=config, ctx=model.ctx
    )
    total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@torch.no_grad()
def test_a_context_beyond_the_range_is_refused_and_its_last_token_is_not():
    """H7: positions are fixed when the model is built."""
    config = _config(max_seq_len=40, rope_scaling_factor=2.0)
    model, tokens = _build(config), _tokens(40)
    cache = model.new_cache(1, 40)
    parts = [model(TokenInputs(t), cache).logits for t in tokens.split(1, dim=1)]
    torch.testing.assert_close(
        torch.cat(parts), model(TokenInputs(tokens)).logits, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        model(TokenInputs(_tokens(41)))
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        model.new_cache(1, 41)
