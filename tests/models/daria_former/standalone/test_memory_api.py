"""The views of memory: what they show is what attention reads, and what they write it reads."""

from __future__ import annotations

import pytest
import torch

from models.daria_former import DariaFormerModel
from models.daria_former.standalone.memory_api import MemoryIntegrationSystem
from tests.equivalence import build
from tests.models.daria_former.shrunk import shrunk
from tests.refusals import assert_refused

TEXT = torch.randint(0, 257, (2, 53), generator=torch.Generator().manual_seed(0))
NEXT = torch.tensor([[7], [9]])


def _model(**changes) -> DariaFormerModel:
    model = DariaFormerModel(shrunk(**changes))
    model.body = build(model.body.specs, model.body.ctx, seed=1, noise=0.3)
    return model.eval()


def _read(model, tokens=TEXT):
    cache = model.new_cache(len(tokens), 128)
    with torch.no_grad():
        model(tokens, kv_cache=cache)
    return cache


@torch.no_grad()
def _next_logits(model, cache):
    return model(NEXT, kv_cache=cache)["logits"]


def test_episodic_slots_are_the_pooled_keys_and_values_of_the_text():
    model = _model(num_layers=1, esv_sites=1)
    pooled = []
    path = model.layers[0].attention.paths["memory"]
    hook = path.register_forward_hook(lambda *_: pooled.append(cache["block_0"].memory.tokens))
    cache = model.new_cache(2, 128)
    with torch.no_grad():
        model(TEXT[:, :16], kv_cache=cache)
    hook.remove()
    tokens = [history.last(16) for history in pooled[0]]
    weights = tokens[3].softmax(dim=-1).unsqueeze(-1)
    (slots,) = model.memory.episodic.read(cache)
    for found, kept in zip(slots, tokens[1:3], strict=True):
        torch.testing.assert_close(found, (weights * kept).sum(dim=2, keepdim=True))


def test_a_text_fills_working_and_episodic_memory_up_to_their_capacity():
    model = _model()
    cache = _read(model)  # three closed segments of 16: strides of 4 and of 16
    memory = model.memory
    assert isinstance(memory, MemoryIntegrationSystem)
    assert (memory.working.num_slots(cache), memory.episodic.num_slots(cache)) == (12, 3)
    assert memory.get_memory_kv(1, cache).keys.shape == (2, 2, 12 + 3 + 8, 16)
    assert memory.encode_and_store_episode(torch.cat((TEXT, TEXT), dim=1)[:, :60], cache) == 4
    assert (memory.working.num_slots(cache), memory.episodic.num_slots(cache)) == (28, 7)
    long = model.new_cache(2, 512)
    assert memory.encode_and_store_episode(TEXT.repeat(1, 6), long) == 19
    assert (memory.working.num_slots(long), memory.episodic.num_slots(long)) == (32, 8)


def test_a_slot_that_is_written_is_read_back_and_changes_the_next_logits():
    model = _model(memory_top_k=23)  # every slot is read
    cache, untouched = _read(model), _read(model)
    value = torch.full((2, 2, 16), 3.0)
    model.memory.episodic.write(0, cache, 1, values=value)
    slots = model.memory.episodic.read_kv(0, cache)
    assert torch.equal(slots.values[:, :, 1], value)
    assert torch.equal(slots.keys, model.memory.episodic.read_kv(0, untouched).keys)
    assert not torch.equal(_next_logits(model, cache), _next_logits(model, untouched))


def test_the_open_segment_chooses_again_after_a_write():
    model = _model(memory_top_k=1, persistent_memory_slots=0)
    cache = _read(model)
    query = cache["block_0"].memory.summaries.last(1)[:, :, 0]
    model.memory.episodic.write(0, cache, 0, keys=100.0 * query)
    _next_logits(model, cache)
    chosen = model.memory.retrieved(0, cache).keys[:, :, 0, 0]
    torch.testing.assert_close(chosen, 100.0 * query)


def test_a_rewritten_slot_of_the_same_content_changes_nothing():
    model = _model()
    cache, untouched = _read(model), _read(model)
    slots = model.memory.working.read_kv(0, cache)
    model.memory.working.write(0, cache, 5, keys=slots.keys[:, :, 5].clone())
    assert torch.equal(_next_logits(model, cache), _next_logits(model, untouched))


def test_a_persistent_slot_that_is_written_changes_the_next_logits():
    model = _model(memory_top_k=8)
    before = _next_logits(model, model.new_cache(2, 8))
    row = torch.full((64,), 2.0)
    model.memory.persistent.write(3, keys=row, values=-row)
    rows = model.memory.persistent.read()
    assert torch.equal(rows.keys[3], row)
    assert torch.equal(rows.values[3], -row)
    assert not torch.equal(_next_logits(model, model.new_cache(2, 8)), before)
    model.memory.persistent.write([3, 4], values=torch.stack((row, row)))
    assert torch.equal(rows.values[3:5], torch.stack((row, row)))


def test_a_generation_under_way_reads_what_was_written_after_a_refresh():
    model = _model(memory_top_k=23)
    persona = torch.randn(2, 16)
    caches = [model.new_cache(2, 128) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(TEXT, kv_cache=cache, persona=persona)
    expected = _next_logits(model, caches[1])
    model.memory.persistent.write(range(8), values=torch.randn(8, 64))
    model.rollback(caches[1], 53)
    assert torch.equal(_next_logits(model, caches[1]), expected)
    model.memory.refresh(caches[0])
    found = _next_logits(model, caches[0])
    assert not torch.equal(found, expected)
    for layer in range(2):
        in_use = caches[0][f"block_{layer}"].static["memory"]
        written = model.memory.persistent.read_kv(layer).values
        torch.testing.assert_close(in_use.values, written.expand(2, -1, -1, -1))
    offset = caches[0]["embedding"].bank[16:]
    torch.testing.assert_close(offset, model.memory.persona.read(persona))


def test_consolidation_is_exact_where_one_block_can_be_met():
    model = _model(num_layers=1, esv_sites=1)
    cache = _read(model)
    fit = model.memory.persistent.consolidate(cache, slots=[0, 2], into=[5, 1], row=1)
    assert fit.key_cosine == pytest.approx(1.0, abs=1e-5)
    assert fit.value_error < 1e-4
    episodic, persistent = model.memory.episodic, model.memory.persistent
    wanted = episodic.read_kv(0, cache).values[1][:, [0, 2]]
    torch.testing.assert_close(
        persistent.read_kv(0).values[0][:, [5, 1]], wanted, rtol=1e-3, atol=1e-4
    )


def test_consolidation_of_many_blocks_is_nearer_than_what_was_there():
    model = _model(num_layers=6, esv_sites=2)
    cache = _read(model)
    persistent = model.memory.persistent
    before = persistent._fit(model.memory.episodic.read(cache), [1], [0], 0)
    after = persistent.consolidate(cache, slots=[1], into=[0])
    assert after.value_error < 0.95 * before.value_error
    assert after.key_cosine > before.key_cosine + 0.2


def test_the_persona_s_slots_are_those_that_its_path_reads():
    model = _model()
    persona = torch.randn(2, 16)
    cache = model.new_cache(2, 128)
    with torch.no_grad():
        model(TEXT, kv_cache=cache, persona=persona)
    for layer in range(2):
        in_use = cache[f"block_{layer}"].static["PersonaPath"]
        found = model.memory.get_persona_kv(layer, persona)
        torch.testing.assert_close(found.keys, in_use.keys)
    assert model.memory.persona.read().shape == (8, 1, 64)


def test_what_cannot_be_written_is_refused():
    model = _model()
    cache, memory = _read(model), model.memory
    with assert_refused("slot", value=3, constraint="3", remedy="0"):
        memory.episodic.write(0, cache, 3, keys=torch.zeros(2, 2, 16))
    with assert_refused("values", value=[2, 16], constraint="[2, 2, 16]", remedy="reshape"):
        memory.episodic.write(0, cache, 0, values=torch.zeros(2, 16))
    with assert_refused("index", value=8, constraint="8", remedy="0"):
        memory.persistent.write(8, keys=torch.zeros(64))
    with assert_refused("keys", value=[1, 63], constraint="[1, 64]", remedy="reshape"):
        memory.persistent.write(0, keys=torch.zeros(63))
    with pytest.raises(ValueError, match="equally many"):
        memory.persistent.consolidate(cache, slots=[0, 1], into=[0])
    with assert_refused("slots", value=9, constraint="3", remedy="0"):
        memory.persistent.consolidate(cache, slots=[9], into=[0])
    with pytest.raises(ValueError, match="layer=2"):
        memory.persistent.read_kv(2)
    model.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        memory.persistent.write(0, keys=torch.zeros(64))


def test_a_model_without_memory_says_so():
    model = _model(paths=("local",))
    assert model.memory.persistent is None
    with assert_refused("model", value="memory", constraint="path", remedy=("memory", "paths")):
        model.memory.get_memory_kv(0, model.new_cache(1, 8))
    with assert_refused("model", value="persona", constraint="path", remedy=("persona", "paths")):
        model.memory.get_persona_kv(0)
