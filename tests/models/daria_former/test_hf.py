"""Peculiarities of an exported Daria-Former; tests/models/hf/test_contract.py has the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)

from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.daria_former import DariaFormerConfig, DariaFormerForCausalLM, DariaFormerHFConfig
from models.daria_former.model import FAMILY
from tests.models.checkpoints import write_checkpoint
from tests.models.families import CASES
from tests.models.hf.trainer_runs import trained_and_resumed
from tests.refusals import assert_refused
from tests.tolerance import FP64, assert_close, rounding

CONFIG = CASES["daria_former"].config.model_copy(update={"vocab_size": 301})
TOKENS = torch.randint(0, 301, (2, 21), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
GREEDY = {"do_sample": False, "pad_token_id": 0}
# 51 tokens: over windows, segments and the capacity of both levels of memory.
NEW = 30


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "step_1", CONFIG, family=FAMILY, pipeline=2, tensor=2)
    remarks = convert.to_hf(folder / "step_1", folder / "hf")
    assert any("trust_remote_code" in remark for remark in remarks)
    return folder


@pytest.fixture(scope="module")
def theirs(exported) -> DariaFormerForCausalLM:
    """In fp64, so that what differs from ours differs by more than the order of a sum."""
    return DariaFormerForCausalLM.from_pretrained(exported / "hf", dtype=torch.float64)


def _ours(folder: Path, **options):
    return load_model(open_checkpoint(folder / "step_1"), device="cpu", **options)


@torch.no_grad()
def test_a_model_of_this_process_is_saved_with_its_code(exported, tmp_path):
    torch.manual_seed(5)
    model = DariaFormerForCausalLM(DariaFormerHFConfig.from_settings(CONFIG)).eval()
    model.save_pretrained(tmp_path)
    for name in ("modeling_daria_former.py", "configuration_daria_former.py"):
        assert (tmp_path / name).read_bytes() == (exported / "hf" / name).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # known here: no remote code
    assert type(again) is DariaFormerForCausalLM
    expected = model.double()(TOKENS).logits
    torch.testing.assert_close(again.double()(TOKENS).logits, expected, **FP64)
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert head.weight is embedding.weight
    torch.manual_seed(5)
    same = DariaFormerForCausalLM(DariaFormerHFConfig.from_settings(CONFIG))
    torch.manual_seed(6)
    other = DariaFormerForCausalLM(DariaFormerHFConfig.from_settings(CONFIG))
    assert torch.equal(same.get_input_embeddings().weight, embedding.weight.float())
    assert not torch.equal(other.get_input_embeddings().weight, embedding.weight.float())


@torch.no_grad()
def test_weights_may_be_loaded_in_bf16(exported):
    model = DariaFormerForCausalLM.from_pretrained(
        exported / "hf", dtype=torch.bfloat16, device_map="cpu"
    )
    ours = _ours(exported, precision="bf16")
    logits = ours(TokenInputs(TOKENS)).logits.transpose(0, 1)
    assert logits.dtype == torch.bfloat16
    assert model(TOKENS).logits.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name.removeprefix("model.")]), name
    assert_close(model(TOKENS).logits, logits, rounding(torch.bfloat16, depth=1, length=1))


# Padding.

_COLUMNS = torch.arange(26).expand(2, -1)
_STARTS, _STOPS = torch.tensor([[5], [2]]), torch.tensor([[26], [20]])


def _padded(stops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 26 columns that begin at column 5 and 2, and their mask."""
    mask = ((_COLUMNS >= _STARTS) & (stops > _COLUMNS)).long()
    tokens = torch.randint(0, 301, (2, 26), generator=torch.Generator().manual_seed(1))
    return tokens * mask, mask


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(theirs):
    tokens, mask = _padded(_STOPS)
    logits = theirs(tokens, attention_mask=mask).logits
    for row, (start, stop) in enumerate(((5, 26), (2, 20))):
        alone = theirs(tokens[row : row + 1, start:stop]).logits[0]
        torch.testing.assert_close(logits[row, start:stop], alone, **FP64)
    other = torch.where(mask == 1, tokens, 300)  # what stands in the padding is not seen
    again = theirs(other, attention_mask=mask).logits
    assert torch.equal(again[mask == 1], logits[mask == 1])  # the same products


@torch.no_grad()
def test_padded_rows_may_be_read_in_chunks(theirs):
    tokens, mask = _padded(torch.tensor([[26], [26]]))
    options = {"attention_mask": mask, "max_new_tokens": NEW, **GREEDY}
    in_chunks = theirs.generate(tokens, prefill_chunk_size=8, **options)
    assert torch.equal(in_chunks, theirs.generate(tokens, **options))


# Generation.


@torch.no_grad()
def test_the_cache_keeps_the_persona_and_the_emotion_that_are_given(theirs):
    options = {"attention_mask": MASK, "max_new_tokens": 15, **GREEDY}
    given = {"emotion_state": torch.full((2, 8), 0.5), "persona": torch.ones(2, 8)}
    cached = theirs.generate(TOKENS, **options, **given)
    assert torch.equal(cached, theirs.generate(TOKENS, use_cache=False, **options, **given))
    assert not torch.equal(cached, theirs.generate(TOKENS, **options))


@torch.no_grad()
def test_drafts_of_an_assistant_that_are_refused_leave_no_trace(theirs):
    options = {"max_new_tokens": NEW, "attention_mask": MASK[:1], "do_sample": False}
    expected = theirs.generate(TOKENS[:1], **options)
    torch.manual_seed(1)
    assistant = DariaFormerForCausalLM(theirs.config).eval().double()
    assistant.generation_config.num_assistant_tokens = 3
    assert torch.equal(theirs.generate(TOKENS[:1], assistant_model=assistant, **options), expected)


@torch.no_grad()
def test_a_generation_ends_at_its_end_token_and_may_go_on_later(theirs):
    options = {"attention_mask": MASK, **GREEDY}
    expected = theirs.generate(TOKENS, max_new_tokens=12, **options)
    end = int(expected[0, 25])
    ended = theirs.generate(TOKENS, max_new_tokens=12, eos_token_id=end, **options)
    first = 21 + int((expected[0, 21:] == end).nonzero()[0])
    assert torch.equal(ended[0, : first + 1], expected[0, : first + 1])
    assert not ended[0, first + 1 :].any()
    cache = theirs.new_cache(40)
    half = theirs.generate(TOKENS, max_new_tokens=5, past_key_values=cache, **options)
    assert cache.get_seq_length() == 25  # the last token has not been put in yet
    mask = torch.ones_like(half)
    more = {"max_new_tokens": 7, "past_key_values": cache, **GREEDY}
    assert torch.equal(theirs.generate(half, attention_mask=mask, **more), expected)


@torch.no_grad()
def test_a_long_prompt_is_worked_off_in_parts_and_only_the_asked_for_logits_are_kept(
    theirs, monkeypatch
):
    whole = theirs(TOKENS).logits
    monkeypatch.setattr("models.hf.modeling.PREFILL_CHUNK", 8)
    for count in (1, 6, 21):
        output = theirs(TOKENS, use_cache=True, logits_to_keep=count)
        assert output.past_key_values.get_seq_length() == 21
        torch.testing.assert_close(output.logits, whole[:, -count:], **FP64)


# Training.


def test_recomputing_changes_no_gradient(exported):
    model = DariaFormerForCausalLM.from_pretrained(exported / "hf").train()
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        assert model.model.recompute is enable
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_that_has_generated_in_inference_mode_can_be_trained(exported):
    model = DariaFormerForCausalLM.from_pretrained(exported / "hf")
    with torch.inference_mode():
        model.generate(TOKENS, attention_mask=MASK, max_new_tokens=3, **GREEDY)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.get_input_embeddings().parameters())


@torch.no_grad()
def test_a_loss_is_divided_by_the_number_that_the_trainer_counts(theirs):
    labels = TOKENS.clone()
    labels[0, :9] = -100
    mean = theirs(TOKENS, labels=labels).loss
    half = theirs(TOKENS, labels=labels, num_items_in_batch=torch.tensor(2 * 32)).loss
    torch.testing.assert_close(half, mean / 2)  # 20 + 12 labels have a token before them


def test_the_trainer_of_transformers_trains_saves_and_goes_on(theirs, tmp_path):
    path = theirs.config.name_or_path
    whole, resumed = trained_and_resumed(
        lambda: DariaFormerForCausalLM.from_pretrained(path), TOKENS, tmp_path
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert any(not torch.equal(whole[n], tensor) for n, tensor in theirs.state_dict().items())


# What cannot be done.


def _call(**options):
    return lambda model: model(TOKENS, **options)


def _continue_with_other_padding(model):
    cache, (tokens, mask) = model.new_cache(40), _padded(torch.tensor([[26], [26]]))
    model(tokens, attention_mask=mask, past_key_values=cache)
    model(tokens[:, :1], attention_mask=torch.ones(2, 27), past_key_values=cache)


def _continue_with_fewer_rows(model):
    cache = model.new_cache(40)
    model(TOKENS, past_key_values=cache)
    model(TOKENS[:1], past_key_values=cache)


def _take_back_too_much(model):
    cache = model.new_cache(40)
    model(TOKENS, past_key_values=cache)
    cache.crop(-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            _call(attention_mask=MASK.index_fill(1, torch.tensor([7]), 0)),
            "attention_mask .*padding",
        ),
        (_call(attention_mask=torch.zeros_like(TOKENS)), "attention_mask .*row"),
        (_call(attention_mask=MASK[:, :20]), r"shape \[2, 20\] must be \[2, 21\]"),
        (
            _call(attention_mask=MASK.index_fill(1, torch.tensor([20]), 0), use_cache=True),
            "attention_mask .*padding_side",
        ),
        (_continue_with_other_padding, "attention_mask .*padding"),
        (_take_back_too_much, "at most segment_len=4 tokens"),
        (_continue_with_fewer_rows, "input_ids of 1 .*2 rows"),
        (_call(past_key_values=DynamicCache()), "is a DynamicCache; .* new_cache"),
        (_call(labels=TOKENS, logits_to_keep=1), "no logits_to_keep"),
        (lambda model: model(TOKENS.repeat(1, 13)), "max_position_embeddings=256"),
        (lambda model: model.generate(TOKENS, max_new_tokens=300), "max_position_embeddings=256"),
        (lambda model: model.generate(TOKENS, num_beams=2, max_new_tokens=2), "num_beams=1"),
        (
            lambda model: model.generate(TOKENS, cache_implementation="static", max_new_tokens=2),
            "cache_implementation='static'",
        ),
        (_call(images=torch.zeros(2, 3, 32, 32)), "image_enabled"),
        (lambda model: model.resize_token_embeddings(400), "vocab_size=301"),
        (
            lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
            "without reentrance",
        ),
    ],
)
def test_what_the_model_cannot_do_it_says(call, message, theirs):
    with pytest.raises(ValueError, match=message):
        call(theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layerz": 3}, "num_layerz=3 .*'num_layers'"),
        ({"num_layers": -3}, "daria_former: num_layers=-3: "),
        ({"num_heads": 5}, "num_heads=5 .*num_kv_heads"),
    ],
)
def test_a_wrong_setting_is_refused_wherever_it_is_read(values, message, exported, tmp_path):
    directory = shutil.copytree(exported / "hf", tmp_path / "hf")
    contents = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(contents | {"num_kv_heads": 4} | values))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(directory)
    with pytest.raises(ValueError, match=message):
        convert.from_hf(directory, tmp_path / "back")


def test_a_configuration_has_the_names_of_both_sides():
    config = DariaFormerHFConfig(hidden_size=1536, tie_word_embeddings=False)
    assert (config.hidden_dim, config.weight_tying) == (1536, False)
    assert config.settings() == DariaFormerConfig(hidden_dim=1536, weight_tying=False)
    config.num_layers = 5
    assert DariaFormerHFConfig.from_dict(config.to_dict()).num_hidden_layers == 5


def test_weights_that_lack_a_parameter_are_not_made_up(exported, tmp_path):
    directory = shutil.copytree(exported / "hf", tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.block_2.ffn.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with assert_refused(
        "model.block_2.ffn.up_proj.weight",
        value="missing",
        constraint="weights",
        remedy="configuration",
    ):
        DariaFormerForCausalLM.from_pretrained(directory)
