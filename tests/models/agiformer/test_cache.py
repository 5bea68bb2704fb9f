"""Generation: any prompt, any chunks, constant memory, and what is taken back."""

from __future__ import annotations

import pytest
import torch

from models.agiformer.cache import MAX_ROLLBACK
from models.base import TokenInputs
from models.generate import generate
from parallel.carry import SequentialModel
from tests.models.agiformer.cases import THINKING, config_of, model_of, text_of
from tests.refusals import assert_refused
from tests.tolerance import FP64

CONFIG = config_of(num_layers=2, **THINKING)


def _cached(model: SequentialModel, text: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = model.new_cache(len(text), text.shape[1])
    return torch.cat([model(TokenInputs(x), cache).logits for x in text.split(sizes, dim=1)])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 97, 98, 99, 100])
def test_a_prompt_of_any_length_at_once_or_byte_by_byte(length):
    """Past many windows, chunks and what a cache keeps to take back."""
    model, text = model_of(CONFIG), text_of(length + 9, batch=2)
    whole = model(TokenInputs(text)).logits
    for sizes in ([length, *[1] * 9], [1] * (length + 9), [length, 5, 4]):
        torch.testing.assert_close(_cached(model, text, sizes), whole, **FP64)


@torch.no_grad()
def test_generation_takes_the_most_probable_byte_of_the_whole_forward_pass():
    model = model_of(CONFIG)
    for length in (1, 6, 7, 8, 9):
        text = text_of(length)
        found = generate(model, text, max_new_tokens=11)
        for _ in range(11):
            byte = model(TokenInputs(text)).logits[-1].argmax(dim=-1, keepdim=True)
            text = torch.cat((text, byte), dim=1)
        assert torch.equal(found, text)


@torch.no_grad()
def test_a_long_text_needs_no_more_memory_or_work_per_byte_than_a_short_one():
    model, calls = model_of(CONFIG), []
    cache = model.new_cache(1, 4000)
    for layer in (model.block_0, model.block_1):
        layer.mlp.up.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    # Bytes in 240 steps each, many times what a rollback may need, which swings in between.
    most = [0, 0, 0]
    for number, chunk in enumerate(text_of(720).split(1, dim=1)):
        model(TokenInputs(chunk), cache)
        own = sum(cache[f"block_{i}"].num_bytes for i in range(2))
        own += cache["head"].projected.num_bytes
        most[number // 240] = max(most[number // 240], own)
    assert calls == [1] * (2 * 180)  # a latent for four bytes, and nothing older again
    assert most[0] == most[1] == most[2] > 0


@torch.no_grad()
@pytest.mark.parametrize("back", [1, 3, 4, 17, MAX_ROLLBACK])
def test_bytes_that_are_taken_back_leave_no_trace(back):
    model, text = model_of(CONFIG), text_of(300)
    cache = model.new_cache(1, 400)
    other = (text + 7) % 61
    for size in (1, 150, 64):
        model(TokenInputs(text[:, :100]), cache)
        kept = 100 - back
        for layer in cache.values():
            layer.rollback(kept)
        parts = []
        for chunk in other[:, : 200 - kept].split(size, dim=1):
            parts.append(model(TokenInputs(chunk), cache).logits)
        joined = torch.cat((text[:, :kept], other[:, : 200 - kept]), dim=1)
        whole = model(TokenInputs(joined)).logits
        torch.testing.assert_close(torch.cat(parts), whole[kept:], **FP64)
        cache = model.new_cache(1, 400)


@torch.no_grad()
def test_taking_back_more_than_is_kept_is_refused():
    model = model_of(CONFIG)
    cache = model.new_cache(1, 200)
    model(TokenInputs(text_of(150)), cache)
    cache["encoder"].rollback(150 - MAX_ROLLBACK)
    with assert_refused("cache", value=86, constraint="back to 85", remedy=("64 bytes", "150")):
        cache["encoder"].rollback(150 - MAX_ROLLBACK - 1)


def test_a_text_longer_than_the_positions_is_refused_before_it_is_generated():
    model = model_of(config_of(max_position_embeddings=20))
    with assert_refused("text", value=21, constraint="max_position_embeddings=20", remedy="raise"):
        generate(model, text_of(12), max_new_tokens=9)
