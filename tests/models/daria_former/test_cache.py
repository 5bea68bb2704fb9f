"""Generation caches and their rollback."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from tests.models.daria_former.cases import BASE, SUBSETS, config_of, model_of, tokens_of
from tests.refusals import assert_refused
from tests.tolerance import FP64


def _feed(model, tokens, cache, *, chunk: int = 1) -> torch.Tensor:
    return torch.cat([model(TokenInputs(t), cache).logits for t in tokens.split(chunk, dim=1)])


def _back(cache, length: int) -> None:
    for layer in cache.values():
        layer.rollback(length)


@torch.no_grad()
@pytest.mark.parametrize(
    "subset",
    ["all text paths", "gru", "no persistent slots", "local and memory", "long only, no sinks"],
)
def test_a_rollback_leaves_no_trace_in_any_subset(subset):
    """H16, by every number of tokens from behind, at and before the end of a segment."""
    model, tokens = (
        model_of(config_of(num_layers=2, **{"esv_sites": 1} | SUBSETS[subset])),
        tokens_of(24),
    )
    whole = model(TokenInputs(tokens)).logits
    for seen in (5, 8, 15, 16, 21):
        for taken_back in range(1, 5):
            cache, kept = model.new_cache(1, 24), seen - taken_back
            refused = (tokens[:, kept:seen] + 1) % BASE.vocab_size
            # At once is hardest: no more than what must be kept is.
            chunk = 24 if taken_back > 2 else 3
            _feed(model, torch.cat((tokens[:, :kept], refused), dim=1), cache, chunk=chunk)
            _back(cache, kept)
            again = _feed(model, tokens[:, kept:], cache, chunk=5)
            torch.testing.assert_close(again, whole[kept:], **FP64)


@torch.no_grad()
def test_drafts_that_are_partly_refused_again_and_again_decode_to_the_full_pass():
    """H16 as speculative decoding does it: four tokens at a time, of which some are taken back."""
    model, tokens = model_of(config_of()), tokens_of(60)
    whole = model(TokenInputs(tokens)).logits
    generator = torch.Generator().manual_seed(2)
    cache, length = model.new_cache(1, 64), 0
    while length < 56:
        accepted = int(torch.randint(0, 5, (1,), generator=generator))
        draft = tokens[:, length : length + 4].clone()
        draft[:, accepted:] = (draft[:, accepted:] + 1) % BASE.vocab_size
        logits = model(TokenInputs(draft), cache).logits
        torch.testing.assert_close(logits[:accepted], whole[length : length + accepted], **FP64)
        length += accepted
        _back(cache, length)


@torch.no_grad()
@pytest.mark.parametrize("steps", [(5,), (4, 1), (4, 4), (1, 1, 1, 1, 1), (-1,)])
def test_more_than_a_segment_is_not_taken_back_in_any_number_of_steps(steps):
    model, tokens = model_of(config_of()), tokens_of(40)
    cache, length = model.new_cache(1, 64), 30
    _feed(model, tokens[:, :length], cache)
    *fine, last = steps
    for step in fine:
        length -= step
        _back(cache, length)
    with pytest.raises(ValueError, match=rf"{length} .*{length - last}\b.* segment_len="):
        _back(cache, length - last)
    # Nothing has been touched.
    again = _feed(model, tokens[:, length:], cache)
    torch.testing.assert_close(again, model(TokenInputs(tokens)).logits[length:], **FP64)


@torch.no_grad()
def test_a_generation_may_be_taken_back_to_its_beginning():
    model, tokens = model_of(config_of()), tokens_of(10)
    cache = model.new_cache(1, 16)
    _feed(model, (tokens[:, :4] + 1) % BASE.vocab_size, cache)
    _back(cache, 0)
    torch.testing.assert_close(
        _feed(model, tokens, cache), model(TokenInputs(tokens)).logits, **FP64
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["images", "persona", "emotion"])
def test_an_input_that_a_generation_began_without_is_refused(name):
    config = config_of(num_layers=2, image_enabled=True, image_size=8, image_patch_size=4)
    values = {
        "images": torch.randn(1, 3, 8, 8),
        "persona": torch.randn(1, config.persona_dim),
        "emotion": torch.rand(1, config.emotion_dim),
    }
    model, tokens, given = model_of(config), tokens_of(9), {name: values[name]}
    cache = model.new_cache(1, 16)
    model(DariaInputs(tokens[:, :4]), cache)
    with assert_refused(name, value="generation", constraint="first", remedy="new cache"):
        model(DariaInputs(tokens[:, 4:], **given), cache)
    # Those of the first call may come again, as transformers hands them to every step.
    cache = model.new_cache(1, 16)
    parts = [model(DariaInputs(t, **given), cache).logits for t in tokens.split(4, dim=1)]
    whole = model(DariaInputs(tokens, **given)).logits
    torch.testing.assert_close(torch.cat(parts), whole, **FP64)


@torch.no_grad()
def test_bytes_of_a_cache_grow_with_the_context_in_the_long_path_alone():
    """Beside it everything has a fixed size: the window, the open segments, the slots."""

    def bytes_at(length: int) -> tuple[int, int]:
        model, cache = shared, shared.new_cache(1, length)
        _feed(model, tokens_of(length), cache, chunk=16)
        blocks = [cache[f"block_{i}"] for i in range(2)]
        return sum(b.num_bytes for b in blocks), sum(b.long.num_bytes for b in blocks)

    config = config_of(num_layers=2)
    shared = model_of(config).float()
    (total, long), (twice_total, twice_long) = bytes_at(96), bytes_at(192)
    per_token = 2 * 2 * config.num_kv_heads * config.head_size * 4  # layers, keys and values, fp32
    assert twice_long - long == 96 * per_token
    assert twice_total - twice_long == total - long
