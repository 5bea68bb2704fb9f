"""Arguments that transformers documents for all causal models: honoured, or refused in one line."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.models.hf.exports import (
    EXPORTED_TOKEN_STATES,
    FAMILIES,
    TOKEN_STATES,
    TOKENS,
    exported,
)
from tests.refusals import assert_refused
from tests.tiers import spread, tiered
from tests.tolerance import FP64

GREEDY = {"do_sample": False, "pad_token_id": 0}
# In fp64, but for the emotion state, which is fp32.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@torch.no_grad()
@pytest.mark.parametrize("kind", tiered(EXPORTED_TOKEN_STATES, TOKEN_STATES))
def test_hidden_states_are_those_that_the_layers_hand_on(kind):
    theirs = exported(kind)
    output = theirs(TOKENS, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == theirs.config.num_hidden_layers + 1
    assert {state.shape for state in states} == {(2, 24, 32)}
    assert torch.equal(output.logits, theirs(TOKENS).logits)
    assert torch.equal(theirs.get_output_embeddings()(states[-1]), output.logits)
    carry, places = theirs.inputs(TOKENS, {}), []
    for layer in theirs.model.layers[:-2]:
        carry = layer(carry)
        equal = [torch.equal(state, carry.hidden.transpose(0, 1)) for state in states]
        places.append(equal.index(True))
    assert places == sorted(places)
    assert places[0] == 0


@torch.no_grad()
@pytest.mark.parametrize(("kind", "use_cache"), spread(TOKEN_STATES, [False, True]))
def test_hidden_states_of_padded_rows_are_those_of_the_rows_alone(kind, use_cache, monkeypatch):
    monkeypatch.setattr("models.hf.modeling.PREFILL_CHUNK", 7)
    theirs, mask = exported(kind).double(), torch.ones_like(TOKENS)
    mask[1, :9] = 0
    options = {"output_hidden_states": True, "use_cache": use_cache}
    found = theirs(TOKENS, attention_mask=mask, logits_to_keep=3, **options)
    assert found.logits.shape[1] == 3
    for row, start in enumerate((0, 9)):
        alone = theirs(TOKENS[row : row + 1, start:], **options)
        for one, whole in zip(alone.hidden_states, found.hidden_states, strict=True):
            torch.testing.assert_close(whole[row, start:], one[0], **CLOSE)
        torch.testing.assert_close(found.logits[row], alone.logits[0, -3:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", TOKEN_STATES)
def test_settings_ask_for_the_same_as_arguments(kind):
    theirs = exported(kind)
    last = theirs(TOKENS, output_hidden_states=True).hidden_states[-1]
    theirs.config.output_hidden_states = True
    assert torch.equal(theirs(TOKENS).hidden_states[-1], last)
    assert theirs(TOKENS, output_hidden_states=False).hidden_states is None
    some = theirs(TOKENS, output_hidden_states=[-1, 1]).hidden_states
    assert [i for i, state in enumerate(some) if state is not None] == [1, len(some) - 1]
    assert len(theirs(TOKENS, return_dict=False)) == 2
    theirs.config.output_hidden_states = False
    assert theirs(TOKENS).past_key_values is None
    theirs.config.use_cache = True
    assert theirs(TOKENS).past_key_values.get_seq_length() == 24
    assert theirs(TOKENS, labels=TOKENS).past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("kind", TOKEN_STATES)
def test_generation_returns_hidden_states_of_every_step(kind):
    theirs = exported(kind).double()
    options = {"output_hidden_states": True, "return_dict_in_generate": True, **GREEDY}
    output = theirs.generate(TOKENS, max_new_tokens=3, **options)
    assert [state[-1].shape[1] for state in output.hidden_states] == [24, 1, 1]
    whole = theirs(output.sequences[:, :-1], output_hidden_states=True)
    for i, state in enumerate(whole.hidden_states):
        steps = torch.cat([step[i] for step in output.hidden_states], dim=1)
        torch.testing.assert_close(steps, state, **FP64)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_ends_at_a_text(kind):
    theirs = exported(kind)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    whole = theirs.generate(TOKENS[:1], max_new_tokens=9, **GREEDY)[0]
    text = tokenizer.decode(whole[27:29])
    options = {"stop_strings": [text], "tokenizer": tokenizer, "max_new_tokens": 9, **GREEDY}
    part = theirs.generate(TOKENS[:1], **options)[0]
    assert tokenizer.decode(part).endswith(text)
    assert torch.equal(part, whole[: len(part)])
    assert 24 < len(part) <= 29


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_asks_for_nothing_is_taken(kind):
    theirs = exported(kind)
    expected = theirs(TOKENS).logits
    nothing = {"inputs_embeds": None, "output_attentions": False, "is_causal": True}
    assert torch.equal(theirs(TOKENS, **nothing).logits, expected)
    places = torch.arange(24).expand(2, -1)
    assert torch.equal(theirs(TOKENS, position_ids=places).logits, expected)
    mask = torch.ones_like(TOKENS)
    mask[1, :9] = 0
    counted = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    for cached in (False, True):
        given = {"attention_mask": mask, "use_cache": cached}
        output = theirs(TOKENS, position_ids=counted, **given)
        assert torch.equal(output.logits[mask == 1], theirs(TOKENS, **given).logits[mask == 1])
    more = {"attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
    cache = output.past_key_values
    step = {"position_ids": counted[:, -1:] + 1, "cache_position": torch.tensor([24])}
    assert theirs(TOKENS[:, :1], past_key_values=cache, **more, **step).logits.shape[1] == 1


RESET = torch.arange(24).remainder(12).expand(2, -1)
REFUSED = [
    ({"inputs_embeds": torch.zeros(2, 24, 32)}, "inputs_embeds.*input_ids"),
    ({"output_attentions": True}, "output_attentions"),
    ({"position_ids": RESET, "use_cache": True}, "position_ids"),
    ({"position_ids": RESET + 1}, "position_ids"),
    ({"position_ids": torch.zeros(2, 1)}, "position_ids"),
    ({"cache_position": torch.arange(1, 25)}, "cache_position"),
    ({"is_causal": False}, "is_causal"),
    ({"cu_seq_lens_q": torch.tensor([0, 12, 24])}, "cu_seq_lens_q"),
    ({"colour": "red"}, "colour"),
]


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_model_cannot_do_is_refused_in_one_line(kind):
    theirs = exported(kind)
    for arguments, message in REFUSED:
        with pytest.raises(ValueError, match=message) as error:
            theirs(TOKENS, **arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="input_ids"):
        theirs(inputs_embeds=torch.zeros(2, 24, 32))
    with pytest.raises(ValueError, match="input_ids"):
        theirs()
    with pytest.raises(ValueError, match="output_attentions"):
        theirs.generate(TOKENS, output_attentions=True, max_new_tokens=2, **GREEDY)
    for change in (theirs.set_input_embeddings, theirs.set_output_embeddings):
        with pytest.raises(ValueError, match=r"\.weight"):
            change(torch.nn.Embedding(61, 32))


@pytest.mark.parametrize("kind", FAMILIES)
def test_attention_weights_as_a_setting_are_refused(kind):
    theirs = exported(kind)
    theirs.config._output_attentions = True  # as from_pretrained(output_attentions=True) does
    with assert_refused("output_attentions", value="weights", constraint="stored", remedy="leave"):
        theirs(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_head_computes_only_the_logits_that_are_kept(kind, monkeypatch):
    monkeypatch.setattr("models.hf.modeling.PREFILL_CHUNK", 7)
    theirs, lengths = exported(kind).double(), []
    expected = theirs(TOKENS).logits
    theirs.get_output_embeddings().register_forward_hook(
        lambda module, arguments, output: lengths.append(len(arguments[0]))
    )
    for use_cache in (False, True):
        lengths.clear()
        found = theirs(TOKENS, use_cache=use_cache, logits_to_keep=5).logits
        # Chunks of a prompt of 24 tokens: 7, 7, 7 and 3. DART also has logits of drafts.
        assert lengths == [1, 1, 2, 3] if use_cache else set(lengths) == {5}
        torch.testing.assert_close(found, expected[:, -5:], **CLOSE)
    lengths.clear()
    theirs.generate(TOKENS, max_new_tokens=3, **GREEDY)
    assert set(lengths) == {1}


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_negative_number_of_logits_is_refused(use_cache):
    with assert_refused("logits_to_keep", value=-3, constraint="negative", remedy="0"):
        exported("amrpa")(TOKENS, use_cache=use_cache, logits_to_keep=-3)
