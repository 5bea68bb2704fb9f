"""Libraries that encode byte-level BPE for `preprocess`, compared with the tokenizer's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_tools import preprocess
from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.preprocess import main
from data_tools.preprocessing import encoding
from data_tools.preprocessing.documents import RawDocument
from data_tools.preprocessing.workers import run_tasks
from data_tools.tokenization import byte_bpe
from data_tools.tokenization.byte_encoders import GigatokenEncoder
from tests.data_tools.tokenization.tokenizer_folders import TEXT, byte_level
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)
_TEXTS = [f"{TEXT} number {number}: {'word ' * (number % 7)}\n" for number in range(400)]


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    encoding._tokenizer.cache_clear()
    yield
    encoding._tokenizer.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _TEXTS))
    byte_level(tmp_path)
    return path


def _preprocess(source: Path, name: str, *options: str, tokenizer: str | None = None) -> Path:
    output = source.parent / name
    tokenizer = tokenizer or str(source.parent / "tokenizer.json")
    main(
        [
            *("--input", str(source), "--output", str(output), "--tokenizer", tokenizer),
            *("--workers", "1", "--no-append-eod", *options),
        ]
    )
    return output


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_a_corpus_does_not_depend_on_the_library(
    encoder: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = IndexedDataset(_preprocess(source, "slow", "--encoder", "tokenizers"))
    assert "encoded by" not in capsys.readouterr().out
    found = IndexedDataset(_preprocess(source, "fast", "--encoder", encoder))
    assert f"encoded by {encoder}; 0.1 % of documents" in capsys.readouterr().out
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found.lengths, expected.lengths)


@pytest.mark.parametrize("from_bytes", [0, 1 << 40], ids=["processes", "threads"])
def test_workers_of_either_kind_write_the_same_corpus(
    from_bytes: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text(source.read_text() * 40)
    monkeypatch.setattr(preprocess, "_PROCESSES_FROM_BYTES", from_bytes)
    kinds = []

    def run(*arguments: Any, in_threads: bool, num_workers: int, **options: Any) -> None:
        kinds.append((in_threads, num_workers))
        run_tasks(*arguments, in_threads=in_threads, num_workers=num_workers, **options)

    monkeypatch.setattr(preprocess, "run_tasks", run)
    shards = ("--shard-megabytes", "1")
    expected = _preprocess(source, "one", *shards, "--encoder", "tokenizers")
    found = _preprocess(source, "two", *shards, "--workers", "2")
    assert kinds == [(False, 1), (from_bytes > 0, 2)]
    for suffix in (".bin", ".idx"):
        assert found.with_suffix(suffix).read_bytes() == expected.with_suffix(suffix).read_bytes()


class _OfAnotherTokenizer(GigatokenEncoder):
    """gigatoken without the last merges, as after a fault of either library."""

    @classmethod
    def of(cls, backend: Any) -> GigatokenEncoder | None:
        spec = json.loads(backend.to_str())
        del spec["model"]["merges"][-4:]
        return super().of(Tokenizer.from_str(json.dumps(spec)))


@pytest.fixture
def _faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(byte_bpe._ENCODERS, "gigatoken", _OfAnotherTokenizer)


@pytest.mark.usefixtures("_faulty")
@pytest.mark.parametrize("share", ["0.0000001", "1"])
def test_other_ids_than_the_tokenizers_own_stop_the_run(share: str, source: Path) -> None:
    """The first document of a process is compared at any share."""
    with _refused(
        f"{source}:1", value="gigatoken", constraint="tokenizers", remedy="--encoder tokenizers"
    ):
        _preprocess(source, "out", "--verify-share", share)
    assert not list(source.parent.glob("out.bin"))


@pytest.mark.usefixtures("_faulty")
def test_a_document_in_a_thousand_is_compared(source: Path) -> None:
    tokenizer = encoding.EncodingSettings(
        str(source.parent / "tokenizer.json"), None, False, "text", False
    ).load_tokenizer()
    assert isinstance(tokenizer, encoding.HuggingFaceTokenizer)
    assert tokenizer._is_compared("the first")
    texts = [f"{number} {TEXT}" for number in range(20_000)]
    drawn = [text for text in texts if tokenizer._is_compared(text)]
    assert 5 <= len(drawn) <= 45  # 20 expected, of the same texts in every run
    with pytest.raises(DataError):
        tokenizer.encode_batch([*texts[:50], drawn[0]])


@pytest.mark.parametrize(
    ("options", "setting", "value", "constraint"),
    [
        (["--encoder", "gigatoken"], "--encoder", "gigatoken", "tokenizer.json"),
        (["--verify-share", "0.5"], "--verify-share", 0.5, "tokenizer.json"),
        (["--verify-share", "1.5"], "--verify-share", 1.5, "[0, 1]"),
    ],
)
def test_an_option_without_effect_is_refused(
    options: list[str], setting: str, value: object, constraint: str, source: Path
) -> None:
    with _refused(
        setting, value=value, constraint=constraint, remedy="correct" if value == 1.5 else "remove"
    ):
        _preprocess(source, "out", *options, tokenizer="bytes")


def test_a_library_that_does_not_support_the_tokenizer_is_refused(source: Path) -> None:
    path = source.parent / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["ignore_merges"] = True
    Tokenizer.from_str(json.dumps(spec)).save(str(path))
    with _refused("--encoder", value="tiktoken", constraint="ids", remedy="leave"):
        _preprocess(source, "out", "--encoder", "tiktoken")


def test_bytes_of_a_document_take_two_bytes_each() -> None:
    document = RawDocument("text.txt", None, "é".encode(), is_json=False)
    settings = encoding.EncodingSettings(
        tokenizer="bytes", eod=None, append_eod=True, json_key="text", skip_bad_lines=False
    )
    found = encoding.encode_documents([document], settings=settings)
    assert found.ids.tolist() == [195, 169, 256]
    assert found.ids.itemsize == 2
