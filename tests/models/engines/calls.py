"""Uses of forward, generate and pipeline."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, pipeline

from tests.models.engines.exports import (
    GREEDY,
    TOKENS,
    VOCAB_SIZE,
    Engine,
    assert_near,
    logits_of,
    tokenizer,
)

MASK = torch.ones_like(TOKENS)


def _generated(model: Any, **options: Any) -> torch.Tensor:
    given = {"attention_mask": MASK, **GREEDY, **options}
    rows = given.pop("rows", TOKENS)
    return model.generate(rows, **given | {"attention_mask": given["attention_mask"][: len(rows)]})


def _check_states(output: Any, model: Any) -> None:
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    with torch.no_grad():
        assert_near(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)


def hidden_states_as_argument(engine: Engine) -> None:
    model = engine.model
    with torch.no_grad():
        _check_states(model(TOKENS, output_hidden_states=True), model)


def hidden_states_as_setting(engine: Engine) -> None:
    model = engine.load(output_hidden_states=True)
    with torch.no_grad():
        _check_states(model(TOKENS), model)


def base_model(engine: Engine) -> None:
    model = engine.model
    with torch.no_grad():
        states = model.base_model(input_ids=TOKENS, attention_mask=MASK).last_hidden_state
        assert_near(model.get_output_embeddings()(states), logits_of(model))
    assert model.base_model.get_input_embeddings() is model.get_input_embeddings()


def inputs_embeds(engine: Engine) -> None:
    model = engine.model
    with torch.no_grad():
        embedded = model.get_input_embeddings()(TOKENS)
        assert_near(model(inputs_embeds=embedded).logits, logits_of(model))


def position_ids(engine: Engine) -> None:
    model = engine.model
    places = torch.arange(24).expand(2, -1)
    assert_near(logits_of(model, position_ids=places), logits_of(model))


def position_ids_of_packed_rows(engine: Engine) -> None:
    model = engine.model
    places = torch.arange(24).remainder(12).expand(2, -1)
    with torch.no_grad():
        parts = [model(part).logits for part in TOKENS.split(12, dim=1)]
    # Without a cache, where transformers looks for the beginnings of documents.
    found = logits_of(model, position_ids=places, use_cache=False)
    assert_near(found, torch.cat(parts, dim=1))
    bounds = torch.tensor([0, 12, 24, 36, 48], dtype=torch.int32)
    flash: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12}
    flash["seq_idx"] = torch.arange(24).div(12, rounding_mode="floor").expand(2, -1)
    again = logits_of(model, position_ids=places, use_cache=False, **flash)
    assert torch.equal(again, found)


def cache_position(engine: Engine) -> None:
    model = engine.model
    assert_near(logits_of(model, cache_position=torch.arange(24)), logits_of(model))


def attention_weights(engine: Engine) -> None:
    model = engine.load(attn_implementation="eager")
    with torch.no_grad():
        assert model(TOKENS, output_attentions=True).attentions[0].shape[-1] == 24


def static_cache(engine: Engine) -> None:
    model = engine.model
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert_near(logits_of(model, past_key_values=cache), logits_of(model))


def dynamic_cache(engine: Engine) -> None:
    model = engine.model
    cache = DynamicCache(config=model.config)
    assert_near(logits_of(model, past_key_values=cache), logits_of(model))


def cache_implementation(engine: Engine) -> None:
    model = engine.model
    found = _generated(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, _generated(model))


def beams(engine: Engine) -> None:
    model = engine.model
    found = _generated(model, num_beams=3)
    assert torch.equal(found, _generated(model, num_beams=3, use_cache=False))


def several_sequences(engine: Engine) -> None:
    model = engine.model
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8}
    torch.manual_seed(0)
    found = _generated(model, **options)
    torch.manual_seed(0)
    assert torch.equal(found, _generated(model, use_cache=False, **options))


def continued_cache(engine: Engine) -> None:
    model = engine.model
    first = _generated(model, return_dict_in_generate=True)
    rows = first.sequences
    mask = torch.ones_like(rows)
    found = model.generate(
        rows, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
    )
    assert torch.equal(found, model.generate(rows, attention_mask=mask, **GREEDY))


def own_continued_cache(engine: Engine) -> None:
    model = engine.model
    cache = DynamicCache() if engine.family == "llama" else model.new_cache(64)
    rows = _generated(model, past_key_values=cache)
    mask = torch.ones_like(rows)
    found = model.generate(rows, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(found, model.generate(rows, attention_mask=mask, **GREEDY))


def stop_strings(engine: Engine) -> None:
    model, words = engine.model, tokenizer()
    letters = [i for i in range(VOCAB_SIZE) if not words.decode([i]).isalpha()]
    ordinary = {"suppress_tokens": letters, "rows": TOKENS[:1]}
    whole = _generated(model, **ordinary)[0]
    text = words.decode(whole[26:28])
    part = _generated(model, stop_strings=[text], tokenizer=words, **ordinary)[0]
    assert torch.equal(part, whole[: len(part)])
    assert 24 < len(part) <= 28


def assisted_as_target(engine: Engine) -> None:
    model, draft = engine.model, engine.exports.shared("llama")
    found = _generated(model, assistant_model=draft, rows=TOKENS[:1])
    assert torch.equal(found, _generated(model, rows=TOKENS[:1]))


def assisted_as_draft(engine: Engine) -> None:
    model, target = engine.model, engine.exports.shared("llama")
    found = _generated(target, assistant_model=model, rows=TOKENS[:1])
    assert torch.equal(found, _generated(target, rows=TOKENS[:1]))


def prompt_lookup(engine: Engine) -> None:
    model = engine.model
    repeated = TOKENS[:1].repeat(1, 2)[:, :30]
    options = {"rows": repeated, "attention_mask": torch.ones_like(repeated)}
    found = _generated(model, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(found, _generated(model, **options))


def early_exit(engine: Engine) -> None:
    model = engine.model
    found = _generated(model, assistant_early_exit=1, rows=TOKENS[:1])
    assert torch.equal(found, _generated(model, rows=TOKENS[:1]))


def left_padding(engine: Engine) -> None:
    model, mask = engine.model, MASK.clone()
    mask[1, :9] = 0
    together = _generated(model, attention_mask=mask)
    alone = model.generate(TOKENS[1:, 9:], attention_mask=MASK[1:, 9:], **GREEDY)
    assert torch.equal(together[1, 9:], alone[0])


def streaming(engine: Engine) -> None:
    model, words = engine.model, tokenizer()
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    found = _generated(model, streamer=streamer, rows=TOKENS[:1])[0]
    assert "".join(streamer) == words.decode(found[24:])


def text_pipeline(engine: Engine) -> None:
    words = tokenizer()
    write = pipeline(
        "text-generation", model=str(engine.directory), tokenizer=words, trust_remote_code=True
    )
    model = engine.model
    given = words("the quick", return_tensors="pt")
    expected = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **GREEDY)
    found = write("the quick", return_full_text=False, **GREEDY)[0]["generated_text"]
    assert found == words.decode(expected[0, given["input_ids"].shape[1] :])
