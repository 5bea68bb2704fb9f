from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.preprocessing.documents import DocumentReader
from data_tools.preprocessing.inputs import cut_pieces, find_inputs
from data_tools.tokenization.tokenizers import load_tokenizer
from data_tools.train_tokenizer import _lines, main, train_tokenizer
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_SOURCE = Path(os.__file__).read_text()
_AWKWARD = [
    _SOURCE,
    "  leading and trailing spaces  ",
    "\ttabs\t\tand\r\nline ends\n\n\n",
    "never seen: \u4f60\u597d \U0001f600 \u00e9\u0301",
    "</s> <unk> <0x41>",
]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "os.txt"
    path.write_text(_SOURCE)
    return path


@pytest.fixture(scope="module")
def model(text_file: Path) -> Path:
    path = text_file.with_name("tokenizer.model")
    main(["--input", str(text_file), "--output", str(path), "--vocab-size", "600"])
    return path


@pytest.mark.parametrize("text", _AWKWARD)
def test_any_text_survives_encoding_and_decoding(model: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(model))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids  # nothing is unknown
    assert tokenizer.eod_id not in ids


def test_tokenizer_has_the_size_asked_for_and_compresses(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (600, 1)
    assert len(tokenizer.encode(_SOURCE)) < 0.6 * len(_SOURCE)
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod_id]) == "a"


def test_training_twice_gives_the_same_file(text_file: Path, model: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.model"
    train_tokenizer([str(text_file)], str(again), vocab_size=600)
    assert again.read_bytes() == model.read_bytes()


def test_existing_model_is_kept_unless_overwritten(text_file: Path, model: Path) -> None:
    with _refused("tokenizer.model", value="exists", constraint="exists", remedy="--overwrite"):
        train_tokenizer([str(text_file)], str(model), vocab_size=500)
    assert load_tokenizer(str(model)).vocab_size == 600


@pytest.mark.parametrize(("vocab_size", "step"), [(100, "raise"), (100_000, "lower")])
def test_impossible_vocabulary_is_refused_and_leaves_nothing(
    text_file: Path, tmp_path: Path, vocab_size: int, step: str
) -> None:
    remedy = ("text", f"{step} it to 300")
    with _refused("--vocab-size", value=vocab_size, constraint="text", remedy=remedy):
        train_tokenizer([str(text_file)], str(tmp_path / "t.model"), vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_output_of_another_suffix_is_refused(text_file: Path) -> None:
    with _refused("--output", value="out.json", constraint=".model", remedy="add"):
        train_tokenizer([str(text_file)], "out.json", vocab_size=600)


def test_bad_line_is_refused_or_skipped(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("not json\n")
    inputs, output = [str(text_file), str(tmp_path / "bad.jsonl")], str(tmp_path / "t.model")
    with pytest.raises(DataError, match=r"bad.jsonl:1: not valid JSON .* --on-bad-line skip"):
        train_tokenizer(inputs, output, vocab_size=400)
    assert train_tokenizer(inputs, output, vocab_size=400, skip_bad_lines=True).vocab_size == 400


def test_large_inputs_are_sampled_by_whole_documents(tmp_path: Path) -> None:
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(f"first {number}\nlast {number}")
    pieces = cut_pieces(find_inputs([str(tmp_path)]), piece_bytes=1 << 30, json_key="text")
    reader = DocumentReader(pieces, json_key="text")
    lines = list(_lines(reader, json_key="text", keep=0.25))
    assert 60 < len(lines) / 2 < 140
    assert [line.replace("first", "last") for line in lines[::2]] == lines[1::2]
    assert lines == list(_lines(reader, json_key="text", keep=0.25))
    assert len(list(_lines(reader, json_key="text", keep=1.0))) == 800


def test_no_size_is_proposed_to_which_a_text_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    with pytest.raises(DataError) as refused:
        train_tokenizer([str(tmp_path / "a.txt")], str(tmp_path / "m.model"), vocab_size=300)
    assert "300" not in str(refused.value).rpartition("; ")[2]
