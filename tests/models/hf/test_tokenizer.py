"""An exported tokenizer is the tokenizer of training, as people load it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from data_tools.tokenization.tokenizers import load_tokenizer
from models import convert
from models.hf.tokenizer_files.check import Loaded, Sample, Training, difference, sample_of
from models.hf.tokenizer_files.export import export_tokenizer_files
from tests.models.checkpoints import config, edit_json, write_checkpoint
from tests.models.hf.tokenizer_files import hugging_face_file, sentencepiece_file
from tests.refusals import assert_refused
from tests.tiers import tiered

FRAGMENTS = ["<sep>", "<user>", "<s>", "</s>", "<unk>", "<0x0A>", "\u2581", " ", "  ", "\n", "S"]
FRAGMENTS += ["ome", "words", "\u00e9", "e\u0301", "\u65e5", "\U0001f600", "\x00", "1234"]


def _texts() -> list[str]:
    """Other ones than the export itself looks at."""
    numbers = random.Random(7)
    lengths = [numbers.randint(1, 9) for _ in range(500)]
    return ["".join(numbers.choice(FRAGMENTS) for _ in range(n)) for n in lengths]


def _exported(source: Path | str, tmp_path: Path, **shape: object) -> list[str]:
    write_checkpoint(tmp_path / "step_5", config(**shape), tokenizer=str(source))
    return convert.to_hf(tmp_path / "step_5", tmp_path / "hf")


def _assert_same(directory: Path, source: Path | str) -> None:
    exported = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    training = load_tokenizer(str(source))
    assert exported.eos_token_id == training.eod_id
    for text in _texts():
        ids = exported.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == training.encode(text), text
        assert exported.decode(ids, skip_special_tokens=True) == training.decode(ids), text


SYMBOLS = ([], ["<sep>", "<user>"], ["\n", "  ", "<s"], ["S", "So"])
ORDINARY = list(zip(SYMBOLS, itertools.cycle([True, False]), strict=False))


@pytest.mark.parametrize(
    ("symbols", "prefix"), tiered(itertools.product(SYMBOLS, [True, False]), ORDINARY)
)
def test_user_defined_symbols_are_found_where_sentencepiece_finds_them(symbols, prefix, tmp_path):
    source = sentencepiece_file(
        tmp_path / "t.model", user_defined_symbols=symbols, add_dummy_prefix=prefix
    )
    assert _exported(source, tmp_path) == []
    _assert_same(tmp_path / "hf", source)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == source.read_bytes()


def test_a_class_that_builds_another_tokenizer_is_replaced(tmp_path):
    """transformers' LlamaTokenizer treats a leading space otherwise than the tokenizer.json that
    published models have beside it."""
    (tmp_path / "own").mkdir()
    source = sentencepiece_file(tmp_path / "t.model")
    training = load_tokenizer(str(source))
    export_tokenizer_files(
        source, tmp_path / "own", Training(training.encode), eod_id=training.eod_id
    )
    declared = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": False}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(declared))
    (remark,) = _exported(tmp_path / "own", tmp_path)
    assert "tokenizer_class is PreTrainedTokenizerFast now: as LlamaTokenizer" in remark
    _assert_same(tmp_path / "hf", tmp_path / "own")


def test_a_class_that_transformers_insists_on_is_refused_where_it_makes_another(tmp_path):
    source = hugging_face_file(tmp_path / "tokenizer.json")
    with pytest.raises(
        ValueError, match=r"as Qwen2Tokenizer .* of type qwen2; pass --no-tokenizer"
    ):
        _exported(source, tmp_path, qkv_bias=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_5", "tokenizer.json"]


def test_a_tokenizer_of_that_class_is_exported(tmp_path):
    source = hugging_face_file(tmp_path / "tokenizer.json", split=PRETOKENIZE_REGEX)
    assert _exported(source, tmp_path, qkv_bias=True) == []
    _assert_same(tmp_path / "hf", source)


def test_what_decodes_otherwise_is_refused(tmp_path):
    source = hugging_face_file(tmp_path / "tokenizer.json")
    training = load_tokenizer(str(source))
    (tmp_path / "hf").mkdir()
    other = Training(training.encode, lambda ids: "x")
    with pytest.raises(ValueError, match=r"transformers decodes .* to .*, training to 'x'"):
        export_tokenizer_files(source, tmp_path / "hf", other, eod_id=training.eod_id)


@pytest.mark.parametrize("splits", [False, True])
def test_a_special_token_has_to_be_read_as_one_unless_its_owner_says_otherwise(splits, tmp_path):
    sample = Sample(["ab"], {"<s>": 256})
    loaded = Loaded("Some", [[97, 98]], ["ab"], [[60, 115, 62]], splits, None, None)
    training = Training(load_tokenizer("bytes").encode, load_tokenizer("bytes").decode)
    expected = None if splits else "reads the special token '<s>' as [60, 115, 62], not as 256"
    assert difference(loaded, sample, training) == expected


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_settings_beside_a_tokenizer_that_are_named_like_tokens_are_none(kind, tmp_path):
    """As in the files of Llama 2, Mistral and Gemma."""
    end = "</s>" if kind == "tokenizer.model" else "<|endoftext|>"
    source = tmp_path / "own" / kind
    source.parent.mkdir()
    sentencepiece_file(source) if source.suffix == ".model" else hugging_face_file(source)
    declared = {"eos_token": end, "add_bos_token": True, "add_eos_token": False}
    declared |= {"bos_token": end, "extra_special_tokens": ["<more>"]}
    declared |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source.parent / "tokenizer_config.json").write_text(json.dumps(declared))
    _exported(source.parent, tmp_path, vocab_size=320)
    _assert_same(tmp_path / "hf", source.parent)


def test_code_of_the_tokenizer_s_own_is_left_out(tmp_path):
    source = hugging_face_file(tmp_path / "tokenizer.json")
    code = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    declared = {"tokenizer_class": "OwnTokenizer", "auto_map": code, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    remarks = _exported(source, tmp_path)
    assert any("auto_map names code" in remark for remark in remarks)
    _assert_same(tmp_path / "hf", source)


def test_a_tokenizer_without_a_form_in_transformers_is_refused(tmp_path):
    write_checkpoint(tmp_path / "step_5", config(vocab_size=60_000), tokenizer=None)
    ranks = tmp_path / "gpt2.tiktoken"
    ranks.write_text("")
    with assert_refused(
        "gpt2.tiktoken:gpt2",
        value="tiktoken",
        constraint="transformers",
        remedy=("tokenizer.json", "--no-tokenizer"),
    ):
        convert.to_hf(tmp_path / "step_5", tmp_path / "hf", tokenizer=f"{ranks}:gpt2")
    assert not (tmp_path / "hf").exists()


def test_the_samples_hold_every_token_every_byte_and_what_the_vocabulary_spells(tmp_path):
    tokenizer = Tokenizer.from_file(str(hugging_face_file(tmp_path / "t.json", special=["<a>"])))
    tokenizer.add_tokens([AddedToken("[b]", special=False)])
    sample = sample_of(tokenizer, ["<sep>"])
    for token in ("<a>", "[b]", "<sep>"):
        wanted = {token, f" {token}", f"{token} ", f"a{token}b", f"a {token} b", 2 * token}
        assert wanted <= set(sample.texts)
        assert sum(token in text for text in sample.texts) > 100
    assert set(map(chr, range(256))) <= set(sample.texts)
    assert sum(" words" in text for text in sample.texts) > 10
    assert sample.special == {"<a>": tokenizer.token_to_id("<a>")}
    assert sample == sample_of(tokenizer, ["<sep>"])


# Bytes.


def test_bytes_have_a_tokenizer(tmp_path):
    assert _exported("bytes", tmp_path) == []
    _assert_same(tmp_path / "hf", "bytes")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    for text in map(chr, (*range(0xD800), *range(0xE000, 0x11000), 0x10FFFF)):
        assert exported.encode(text) == list(text.encode())
    assert exported.decode(range(128)) == "".join(map(chr, range(128)))
    assert exported("a<|endoftext|>b").input_ids == [97, 256, 98]
    assert len(exported) == 257


def test_a_model_of_bytes_works_in_a_pipeline(tmp_path):
    _exported("bytes", tmp_path)
    writes = pipeline("text-generation", str(tmp_path / "hf"), device="cpu")
    (found,) = writes("h\u00e9llo ", max_new_tokens=4, do_sample=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor([list("h\u00e9llo ".encode())])
    rows = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert found["generated_text"] == load_tokenizer("bytes").decode(rows[0].tolist())


def test_bytes_that_transformers_would_normalize_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bytes: .* as Qwen2Tokenizer .* of type qwen2"):
        _exported("bytes", tmp_path, qkv_bias=True)


# What a model's owner declared.

TEMPLATE = "{{bos_token}}{% for m in messages %}{{m.content}}<|eot|>{% endfor %}"


def _special_ids(directory: Path) -> list[int]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [tokenizer.token_to_id(token) for token in ("<|begin|>", "<|end|>", "<|eot|>")]


def _chat_model(directory: Path) -> Path:
    """A model of transformers with all that its owner says about texts."""
    write_checkpoint(directory.parent / "plain", config(), tokenizer=None)
    convert.to_hf(directory.parent / "plain", directory)
    hugging_face_file(directory / "tokenizer.json", special=["<|begin|>", "<|end|>", "<|eot|>"])
    begin, end, turn = _special_ids(directory)
    declared = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(declared))
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|begin|>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("tools")
    edit_json(directory / "config.json", bos_token_id=begin, eos_token_id=end, pad_token_id=0)
    generation = {"eos_token_id": [end, turn], "pad_token_id": end, "bos_token_id": begin}
    generation |= {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def _declared(directory: Path) -> dict[str, object]:
    """As transformers reads it."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = model.generation_config.to_diff_dict()
    generation.pop("_from_model_config", None)
    generation.pop("transformers_version", None)
    return {
        "config": {name: getattr(model.config, name) for name in ids},
        "generation": generation,
        "templates": tokenizer.chat_template,
        "tokens": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        "ids": tokenizer("Some <|eot|>").input_ids,
    }


def test_a_round_trip_keeps_what_the_owner_declared(tmp_path):
    model = _chat_model(tmp_path / "chat")
    convert.from_hf(model, tmp_path / "imported")
    convert.to_hf(tmp_path / "imported", tmp_path / "back")
    expected = _declared(model)
    assert expected["generation"]["eos_token_id"] == _special_ids(model)[1:]
    assert expected["templates"] == {"default": TEMPLATE, "tools": "tools"}
    assert _declared(tmp_path / "back") == expected
    convert.to_hf(tmp_path / "imported", tmp_path / "bare", with_tokenizer=False)
    for name in ("config.json", "generation_config.json"):
        same = [json.loads((tmp_path / d / name).read_text()) for d in ("back", "bare")]
        assert same[0] == same[1]


def _trained_on(tmp_path: Path, origin: Path, tokenizer: Path) -> Path:
    """A checkpoint of a run that began from `origin`."""
    step = tmp_path / "run" / "checkpoints" / "step_3"
    write_checkpoint(step, config(), tokenizer=str(tokenizer))
    run = json.loads((step / "manifest.json").read_text())["config"]
    edit_json(step / "manifest.json", config=run | {"training": {"init_from": str(origin)}})
    return tmp_path / "run"


def test_a_run_that_began_from_an_import_keeps_it_too(tmp_path):
    model = _chat_model(tmp_path / "chat")
    convert.from_hf(model, tmp_path / "imported")
    run = _trained_on(tmp_path, tmp_path / "imported", tmp_path / "imported" / "tokenizer")
    assert convert.to_hf(run, tmp_path / "back") == []
    assert _declared(tmp_path / "back") == _declared(model)
    (tmp_path / "imported").rename(tmp_path / "moved")
    (remark,) = convert.to_hf(run, tmp_path / "alone", tokenizer=str(model))
    assert f"training.init_from={tmp_path / 'imported'} is not there any more" in remark
    alone, (begin, end, _) = _declared(tmp_path / "alone"), _special_ids(model)
    assert alone["config"] == {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}
    assert alone["generation"] == {"bos_token_id": begin, "eos_token_id": end}


def test_the_end_token_of_training_is_always_among_those_that_end_a_text(tmp_path):
    model = _chat_model(tmp_path / "chat")
    convert.from_hf(model, tmp_path / "imported")
    other = hugging_face_file(tmp_path / "tokenizer.json", special=["<|endoftext|>"])
    run = _trained_on(tmp_path, tmp_path / "imported", other)
    convert.to_hf(run, tmp_path / "back")
    _, end, turn = _special_ids(model)
    own = load_tokenizer(str(other)).eod_id
    assert own not in (end, turn)
    for name, ends in (("config.json", [end]), ("generation_config.json", [end, turn])):
        contents = json.loads((tmp_path / "back" / name).read_text())
        assert contents["eos_token_id"] == [own, *ends]


def test_what_nobody_declares_is_said_to_be_nothing(tmp_path):
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=None)
    assert convert.to_hf(tmp_path / "step_5", tmp_path / "hf") == [
        "no tokenizer files were written"
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (None,) * 3


@pytest.mark.parametrize(
    ("file", "contents", "parts"),
    [
        (
            "generation_config.json",
            {"pad_token_id": [1.5]},
            ("generation_config.json", [1.5], "pad_token_id", "correct"),
        ),
        ("generation_config.json", None, ("generation_config.json", "JSON", "object", "repair")),
        ("tokenizer_config.json", None, ("tokenizer_config.json", "JSON", "object", "repair")),
    ],
)
def test_damaged_declarations_are_refused(file, contents, parts, tmp_path):
    model = _chat_model(tmp_path / "chat")
    if contents is None:
        (model / file).write_text("[1, 2")
    else:
        edit_json(model / file, **contents)

    def there_and_back() -> None:
        convert.from_hf(model, tmp_path / "imported")
        convert.to_hf(tmp_path / "imported", tmp_path / "back")

    with assert_refused(*parts):
        there_and_back()
    assert not (tmp_path / "back").exists()
