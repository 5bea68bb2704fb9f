from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from data_tools.errors import DataError
from data_tools.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint
from tests.data_tools.tokenization.tokenizer_folders import TEXT, byte_level, declare
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_PARTS = [*TEXT.split(" "), "'ll", "123", " ", "   ", "\n\n", "e\u0301", "<|endoftext|>", "?!"]


def _vocab_and_merges(folder: Path, *, end: str | None = "<|endoftext|>") -> Path:
    """As `save_model` of the tokenizers library and Megatron's GPT2BPETokenizer have them."""
    tokenizer = ByteLevelBPETokenizer()
    special = [] if end is None else [end]
    tokenizer.train_from_iterator(
        [TEXT] * 10, vocab_size=300, special_tokens=special, show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    return folder


def _mixtures() -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(_PARTS, k=generator.randint(1, 9))) for _ in range(80)]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_vocabulary_and_merges_are_the_tokenizer_that_transformers_makes_of_them(
    tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    _vocab_and_merges(tmp_path)
    declare(tmp_path, tokenizer_config={"tokenizer_class": name, "eos_token": "<|endoftext|>"})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == name.removesuffix("Fast")
    ours = load_tokenizer(str(tmp_path), special_tokens=None)
    assert (ours.eod_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    for text in _mixtures():
        assert ours.encode(text) == theirs(text).input_ids
        [found] = ours.encode_batch([text])  # which takes the fast way
        assert list(found) == theirs(text).input_ids
    assert load_tokenizer(str(tmp_path / "vocab.json")).fingerprint == ours.fingerprint
    assert tokenizer_fingerprint(str(tmp_path)) == ours.fingerprint


def test_vocabulary_and_merges_alone_are_read_as_their_own_library_reads_them(
    tmp_path: Path,
) -> None:
    _vocab_and_merges(tmp_path)
    files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    theirs = ByteLevelBPETokenizer(*files)
    ours = load_tokenizer(str(tmp_path))
    for text in (each.replace("<|endoftext|>", "") for each in _mixtures()):
        assert ours.encode(text) == theirs.encode(text).ids
    # It declares nothing, and has one token of a usual name.
    assert ours.boundary_tokens.require_eod() == theirs.token_to_id("<|endoftext|>")
    parsed = load_tokenizer(str(tmp_path), special_tokens="parse")
    assert parsed.encode("river<|endoftext|>") == [*ours.encode("river"), ours.eod_id]
    declare(tmp_path, tokenizer_config={"bos_token": "<|endoftext|>", "add_bos_token": True})
    assert load_tokenizer(str(tmp_path)).boundary_tokens.bos_ids(None) == (ours.eod_id,)


def test_tokenizer_json_counts_before_vocabulary_and_merges(tmp_path: Path) -> None:
    _vocab_and_merges(tmp_path, end=None)
    byte_level(tmp_path, ["</s>"])
    assert load_tokenizer(str(tmp_path)).eod_id == 300


def test_saved_as_one_file_it_is_the_same_tokenizer(tmp_path: Path) -> None:
    _vocab_and_merges(tmp_path / "two")
    declare(tmp_path / "two", added_tokens={"<tool>": 300})
    ours = load_tokenizer(str(tmp_path / "two"), special_tokens="parse")
    ours.save(tmp_path / "tokenizer.json")  # type: ignore[attr-defined]
    saved = load_tokenizer(str(tmp_path / "tokenizer.json"), special_tokens="parse")
    for text in (*_mixtures(), "a<tool>b"):
        assert saved.encode(text) == ours.encode(text)


def test_files_that_do_not_say_enough_are_refused(tmp_path: Path) -> None:
    folder = _vocab_and_merges(tmp_path)
    declare(folder, tokenizer_config={"tokenizer_class": "CLIPTokenizer"})
    with _refused(
        "vocab.json",
        value="CLIPTokenizer",
        constraint=("tokenizer_config.json", "GPT2Tokenizer"),
        remedy="tokenizer.json",
    ):
        load_tokenizer(str(folder))
    declare(folder, tokenizer_config={})
    (folder / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    with _refused("vocab.json", value=254, constraint="256 bytes", remedy="tokenizer.json"):
        load_tokenizer(str(folder))
    (folder / "merges.txt").write_text("#version: 0.2\na x\n")
    with _refused("vocab.json", value="merges.txt", constraint="`x`", remedy="download"):
        load_tokenizer(str(folder))
    (folder / "merges.txt").unlink()
    with _refused("vocab.json", value="merges.txt", constraint="no", remedy="tokenizer.json"):
        load_tokenizer(str(folder))
