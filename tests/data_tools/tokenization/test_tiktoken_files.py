from __future__ import annotations

import base64
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_tools.errors import DataError
from data_tools.tokenization import tiktoken_files
from data_tools.tokenization.byte_encoders import byte_letters
from data_tools.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_TEXT = "def f(x):\n    return x + 1  # caf\u00e9 \u4f60\u597d\t\U0001f600\r\n\n <|endoftext|>"


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Tokenizer]:
    """A file of ranks of a tokenizer trained here, and the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT] * 10, trainer)
    letters = byte_letters()
    lines = [
        base64.b64encode(bytes(letters[letter] for letter in token)) + b" %d\n" % rank
        for token, rank in tokenizer.get_vocab().items()
    ]
    (tmp_path / "small.tiktoken").write_bytes(b"".join(lines))
    special = {"<|endoftext|>": 290, "<|im_end|>": 291, "<|begin|>": 292}
    rules = tiktoken_files.ENCODINGS["gpt2"]._replace(
        num_ranks=290, vocab_size=295, special=special, bos="<|begin|>"
    )
    monkeypatch.setitem(tiktoken_files.ENCODINGS, "gpt2", rules)
    return tmp_path / "small.tiktoken", tokenizer


def test_ids_are_those_of_the_same_tokenizer_in_another_file(ranks: tuple[Path, Tokenizer]) -> None:
    path, theirs = ranks
    tokenizer = load_tokenizer(f"{path}:gpt2")
    ids = tokenizer.encode(_TEXT)
    assert ids == theirs.encode(_TEXT).ids
    assert tokenizer.encode_batch([_TEXT, "x"]) == [ids, tokenizer.encode("x")]
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == _TEXT
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (295, 290)
    assert tokenizer.decode([*ids, 294]) == _TEXT  # a model may produce what the file lacks
    assert tokenizer.fingerprint == tokenizer_fingerprint(f"{path}:gpt2")


def test_runs_of_spaces_of_any_length_are_encoded(ranks: tuple[Path, Tokenizer]) -> None:
    tokenizer = load_tokenizer(f"{ranks[0]}:gpt2")
    text = "a" + " " * 3_000_000 + "\n" * 1_000_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_of_an_encoding_are_parsed_and_begin_and_end_documents(
    ranks: tuple[Path, Tokenizer],
) -> None:
    spec = f"{ranks[0]}:gpt2"
    tokenizer = load_tokenizer(spec, special_tokens="parse")
    # Longer than a part that runs of spaces are cut to, so that a cut could fall into the token.
    text = "a" + " " * 24_990 + "<|im_end|>" * 3 + "b"
    ids = tokenizer.encode(text)
    assert ids.count(291) == 3
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.replace("<|im_end|>", "")
    assert 291 not in load_tokenizer(spec).encode(text)
    assert tokenizer.boundary_tokens.bos_ids(None) == (292,)
    assert load_tokenizer(spec, eod="<|im_end|>").eod_id == 291


@pytest.mark.parametrize("name", tiktoken_files.ENCODINGS)
def test_special_ids_of_an_encoding_lie_beyond_the_ranks(name: str) -> None:
    rules = tiktoken_files.ENCODINGS[name]
    ids = rules.special.values()
    assert len({*ids}) == len(rules.special)
    assert rules.num_ranks <= min(ids)
    assert max(ids) < rules.vocab_size
    assert {rules.eod, rules.bos or rules.eod} <= rules.special.keys()


def test_file_that_does_not_fit_its_encoding_is_refused(
    ranks: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    path, _ = ranks
    with _refused(
        "small.tiktoken", value=290, constraint=("289", "100255", "cl100k_base"), remedy="encoding"
    ):
        load_tokenizer(f"{path}:cl100k_base")
    with _refused(
        "small.tiktoken",
        value="ranks",
        constraint="split",
        remedy=("tiktoken:ENCODING", "cl100k_base"),
    ):
        load_tokenizer(str(path))
    with _refused(
        "small.tiktoken:gpt2", value="<no>", constraint="vocabulary", remedy="--eod TOKEN"
    ):
        load_tokenizer(f"{path}:gpt2", eod="<no>")
    with _refused(
        str(tmp_path / "absent"),
        value="No such file or directory",
        constraint="No such file",
        remedy="path",
    ):
        load_tokenizer(f"{tmp_path}/absent:gpt2")
    path.write_text("aGVsbG8= 0\nno base64\n")
    with _refused("small.tiktoken:2", value="rank", constraint="base64", remedy="rank file"):
        load_tokenizer(f"{path}:gpt2")
