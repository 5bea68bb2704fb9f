"""The whole model: no leak, no boundary, no growth, and images over the wire."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from models.daria_former.layers import DACBlock
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.equivalence import run_cut
from tests.models.daria_former.cases import BASE, config_of, model_of, tokens_of
from tests.refusals import assert_refused
from tests.tolerance import FP64


def test_images_cross_the_wire_bit_for_bit_and_their_gradient_comes_back():
    config = config_of(image_enabled=True, image_size=8, image_patch_size=4)
    inputs = DariaInputs(tokens_of(11, batch=2), images=torch.randn(2, 3, 8, 8))
    gradients = []
    for cuts in ((), (1, 2, 3, 4, 5)):
        model = model_of(config).train().float()  # as the wire declares it
        schema = FAMILY.carry_schema(
            config, model.ctx, micro_batch_size=2, seq_length=11, num_modality_tokens=4
        )
        output = run_cut(model.specs, model, inputs, schema, cuts)
        FAMILY.loss(output, inputs.tokens, config=config, ctx=model.ctx).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())
    assert gradients[0]["embedding.encoder.image.projection"].abs().max() > 0


def test_encoders_without_images_are_refused_before_a_run():
    config = config_of(image_enabled=True, image_size=8, image_patch_size=4)
    with assert_refused(
        "image_enabled",
        value=True,
        constraint="audio_enabled=False",
        remedy="models.daria_former.standalone.training",
    ):
        FAMILY.carry_schema(config, ParallelContext.single(), micro_batch_size=2, seq_length=8)


@torch.no_grad()
@pytest.mark.parametrize("path", ["local", "long", "memory", "persona"])
def test_no_path_alone_sees_a_later_token(path):
    """With every head's gate on one path (H1)."""
    model = model_of(config_of(path_dropout=0.0))
    for layer in model.layers:
        if isinstance(layer, DACBlock):
            bias = layer.attention.gate_bias
            bias.copy_(torch.full_like(bias, -1e4))
            bias[:, layer.attention.config.all_paths.index(path)] = 1e4
    tokens = tokens_of(24)
    before = model(TokenInputs(tokens)).logits
    for position in range(1, 24):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % BASE.vocab_size
        assert torch.equal(model(TokenInputs(changed)).logits[:position], before[:position])


@torch.no_grad()
def test_the_window_ends_where_it_says():
    """H6: token t - w is out of reach of a local path of window w, t - w + 1 is in it."""
    config = config_of(paths=("local",), num_layers=1, esv_sites=1, sliding_window_size=5)
    model = model_of(config)
    for layer in (model.layers[0].emotion, model.layers[1].emotion):
        layer.write_bias.fill_(-1e4)  # no emotion: it remembers on its own
    tokens = tokens_of(16)
    before = model(TokenInputs(tokens)).logits
    changed = tokens.clone()
    changed[:, 4] += 1
    differs = (model(TokenInputs(changed)).logits != before).any(dim=-1)[:, 0]
    assert differs.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


@torch.no_grad()
def test_random_chunks_decode_to_the_full_pass():
    """H3."""
    model, tokens = model_of(config_of()), tokens_of(61, batch=2)
    whole = model(TokenInputs(tokens)).logits
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        sizes: list[int] = []
        while sum(sizes) < 61:
            draw = int(torch.randint(1, 14, (1,), generator=generator))
            sizes.append(min(draw, 61 - sum(sizes)))
        cache = model.new_cache(2, 61)
        parts = [model(TokenInputs(t), cache).logits for t in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts), whole, **FP64)


@torch.no_grad()
def test_the_stream_of_a_deep_model_does_not_explode():
    """H8: what a fresh block writes has a size of its own, so the stream grows by at most a
    constant per layer (.02 of it the normalised skip), not by a factor; finite in bf16."""
    config = config_of(num_layers=80, esv_sites=4, initializer_range=0.02)
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).eval()
    carry, sizes = model.layers[0](TokenInputs(tokens_of(16))), []
    for layer in model.layers[1:-1]:
        carry = layer(carry)
        sizes.append(carry.hidden.square().mean().sqrt().item())
    assert sizes[79] < 0.025 * 80
    assert sizes[79] < 2.2 * sizes[39]
    assert model.bfloat16()(TokenInputs(tokens_of(16))).logits.isfinite().all()


@torch.no_grad()
def test_a_context_beyond_the_range_is_refused_and_its_last_token_is_not():
    """H7: positions are fixed when the model is built."""
    config = config_of(max_seq_len=40, rope_scaling_factor=2.0)
    model, tokens = model_of(config), tokens_of(40)
    cache = model.new_cache(1, 40)
    parts = [model(TokenInputs(t), cache).logits for t in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts), model(TokenInputs(tokens)).logits, **FP64)
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        model(TokenInputs(tokens_of(41)))
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        model.new_cache(1, 41)
