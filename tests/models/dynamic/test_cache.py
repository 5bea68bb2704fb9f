from __future__ import annotations

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.dynamic.cache import LEAST_ROOM, RaggedKVCache
from models.generate import generate
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.layer_state import layer_state_owners, update_layer_states
from tests.distributed import run_ranks
from tests.equivalence import build
from tests.models.dynamic.cases import (
    VARIANTS,
    config_of,
    evaluated,
    family_of,
    tokens_of,
)
from tests.refusals import assert_refused
from tests.tiers import spread
from tests.tolerance import FP64

SEQ, BATCH = 40, 3


def _variant(name: str, **changes) -> tuple[SequentialModel, torch.Tensor]:
    family, own = VARIANTS[name]
    tokens = tokens_of(SEQ, batch=BATCH)
    return evaluated(config_of(family, **own | changes), tokens), tokens


def _fed(model: SequentialModel, cache: dict, tokens: torch.Tensor, chunks: int | list[int]):
    parts = [model(TokenInputs(part), cache).logits for part in tokens.split(chunks, dim=1)]
    return torch.cat(parts)


def _routed(cache: dict) -> list[RaggedKVCache]:
    found = [getattr(layer, "dynamic", layer) for layer in cache.values()]
    return [layer for layer in found if isinstance(layer, RaggedKVCache)]


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefill_in_any_chunks_equals_step_by_step_equals_the_whole(variant):
    model, tokens = _variant(variant)
    whole = model(TokenInputs(tokens)).logits
    for chunks in ([SEQ], [1] * SEQ, [13, 1, 1, 25]):
        cache = model.new_cache(BATCH, SEQ)
        torch.testing.assert_close(_fed(model, cache, tokens, chunks), whole, **FP64)
        for layer in _routed(cache):
            assert 0 < layer.counts.sum() < BATCH * SEQ  # some tokens, and not all


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "length"),
    spread(["mod", "mod predictor", "dtf", "dtf cu", "dtf random"], [0, 1, 7, 20]),
)
def test_a_generation_goes_on_from_where_it_was_taken_back_to(variant, length):
    model, tokens = _variant(variant)
    other = tokens_of(SEQ, batch=BATCH, seed=9)
    cache = model.new_cache(BATCH, SEQ)
    if length:
        _fed(model, cache, tokens[:, :length], length)
    _fed(model, cache, other[:, length:31], 3)
    for layer in cache.values():
        layer.rollback(length)
    found = _fed(model, cache, tokens[:, length:], 4)
    torch.testing.assert_close(found, model(TokenInputs(tokens)).logits[length:], **FP64)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mod", "dtf"])
def test_rows_of_equal_counts_are_computed_whole_and_go_on_after_they_differ(variant):
    """One row, token by token, after it was taken back; and two that are equal for 20 tokens."""
    model, tokens = _variant(variant)
    cache = model.new_cache(1, SEQ)
    _fed(model, cache, tokens_of(SEQ, batch=1, seed=9)[:, :23], [1] * 23)
    for layer in cache.values():
        layer.rollback(0)
    alone = _fed(model, cache, tokens[:1], [1] * SEQ)
    torch.testing.assert_close(alone, model(TokenInputs(tokens[:1])).logits, **FP64)
    equal = tokens[:1].expand(2, -1).clone()
    equal[1, 20:] = tokens[1, 20:]
    together = _fed(model, model.new_cache(2, SEQ), equal, [5, *[1] * (SEQ - 5)])
    torch.testing.assert_close(together, model(TokenInputs(equal)).logits, **FP64)


def test_a_cache_is_taken_back_only_to_where_it_has_been():
    model, tokens = _variant("dtf")
    cache = model.new_cache(BATCH, SEQ)
    with torch.no_grad():
        model(TokenInputs(tokens[:, :5]), cache)
    for layer in (cache["pair_0"], cache["pair_0"].dynamic):
        with assert_refused("cache of length", value=5, constraint="6", remedy="from 0 to 5"):
            layer.rollback(6)


@torch.no_grad()
def test_rows_that_are_routed_together_do_not_see_each_other():
    model, tokens = _variant("mod", mod_every=1, mod_offset=0)
    cache = model.new_cache(BATCH, SEQ)
    together = _fed(model, cache, tokens, [1] * SEQ)
    assert len({tuple(layer.counts.tolist()) for layer in _routed(cache)}) > 1
    for i in range(BATCH):
        alone = _fed(model, model.new_cache(1, SEQ), tokens[i : i + 1], [1] * SEQ)
        torch.testing.assert_close(alone[:, 0], together[:, i], **FP64)


@torch.no_grad()
def test_a_cache_takes_every_token_when_all_are_chosen_and_grows_for_it():
    length = 400
    config = config_of("mod", capacity_gamma=0.1, max_position_embeddings=length)
    tokens = tokens_of(length, batch=2)
    model = evaluated(config, tokens[:, :10])
    for module in model.modules():
        if hasattr(module, "tau"):
            module.tau.fill_(-float("inf"))
    cache = model.new_cache(2, length)
    (first, *_) = _routed(cache)
    found = [_fed(model, cache, tokens[:, :50], 50)]
    room = first.num_bytes
    found.append(_fed(model, cache, tokens[:, 50:], 100))
    whole = model(TokenInputs(tokens)).logits
    torch.testing.assert_close(torch.cat(found), whole, **FP64)
    assert first.counts.tolist() == [length] * 2
    assert first.num_bytes > 2 * room


def test_the_cache_of_a_routed_layer_is_as_large_as_its_share_of_tokens():
    config = config_of("mod", capacity_gamma=0.125, max_position_embeddings=4096)
    tokens = tokens_of(16, batch=4)
    model = evaluated(config, tokens)
    cache = model.new_cache(4, 4096)
    _fed(model, cache, tokens, 16)
    dense, routed, *_ = (cache[f"layer_{i}"].num_bytes for i in range(4))
    expected = (1.25 * 0.125 * 4096 + LEAST_ROOM) / 4096
    assert routed / dense == pytest.approx(expected, rel=0.05)


def test_more_tokens_than_a_cache_has_room_for_are_refused():
    model, _ = _variant("mod")
    cache = RaggedKVCache(1, 4, share=0.5)
    with assert_refused("max_length", value=4, constraint="5 positions", remedy="max_length"):
        cache.begin(torch.ones(1, 5, dtype=torch.bool))
    with assert_refused(
        "position", value=128, constraint="max_position_embeddings=128", remedy=("shorten", "raise")
    ):
        model.new_cache(1, 129)
    with assert_refused(
        "position", value=128, constraint="max_position_embeddings=128", remedy=("shorten", "raise")
    ):
        model(TokenInputs(tokens_of(129)))


def test_the_oracle_of_the_k_best_cannot_generate():
    model, tokens = _variant("mod", causal_router="topk")
    with assert_refused(
        "causal_router", value="topk", constraint="generation", remedy=("threshold", "predictor")
    ):
        generate(model, tokens, max_new_tokens=2)


def _generated() -> torch.Tensor:
    """Of two tensor ranks, each of which holds half of the heads."""
    config, tokens = config_of("dtf"), tokens_of(9, batch=2)
    world = torch.distributed.is_initialized()
    ctx = ParallelContext.from_world(tensor=2) if world else ParallelContext.single()
    model = build(family_of(config).layer_specs(config), ctx, seed=11, noise=0.2)
    with torch.no_grad():
        model(TokenInputs(tokens))
    update_layer_states(layer_state_owners(model), ctx=ctx)
    return generate(model.eval(), tokens, max_new_tokens=12)


def test_tensor_ranks_generate_what_one_process_does():
    expected = _generated()
    for rows in run_ranks(_generated, 2):
        assert torch.equal(rows, expected)
