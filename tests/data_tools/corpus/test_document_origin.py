"""Origin of a document: its number, its input and its line, as far as the corpus records them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.corpus.byte_dataset import ByteStream, MappedFiles
from data_tools.corpus.indexed import IndexedDataset, IndexedStream
from data_tools.corpus.jsonl_cache import open_jsonl
from data_tools.corpus.jsonl_stream import JsonlStream
from data_tools.corpus.token_stream import DocumentOrigin
from data_tools.merge import main as merge
from data_tools.preprocess import main as preprocess
from data_tools.split import main as split


def _lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_files_are_documents_and_blank_lines_begin_one_in_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n\n\nfour\n")
    (tmp_path / "b.txt").write_text("five\n")
    files = MappedFiles([tmp_path / "a.txt", tmp_path / "b.txt"])
    size = len("one\n\ntwo\nthree\n\n\nfour\n") + 1
    whole, cut = ByteStream(files), ByteStream(files, blank_lines=True)
    assert whole.origin_at(8) == DocumentOrigin(0, str(tmp_path / "a.txt"), 1)
    assert whole.origin_at(size) == DocumentOrigin(1, str(tmp_path / "b.txt"), 1)
    text = (tmp_path / "a.txt").read_text()
    for word, line in (("one", 1), ("three", 3), ("four", 7)):
        origin = cut.origin_at(text.index(word))
        assert origin == DocumentOrigin(None, str(tmp_path / "a.txt"), line), word


@pytest.mark.parametrize("cached", [True, False])
def test_a_document_of_a_jsonl_file_is_a_line(cached, tmp_path):
    first = tmp_path / "a.jsonl"
    first.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "tw\\no"}\n')
    files = MappedFiles([first, _lines(tmp_path / "b.jsonl", ["three"])])
    stream = (
        open_jsonl(files, json_key="text", cache_dir=str(tmp_path / "cache"))
        if cached
        else JsonlStream(files, json_key="text")
    )
    assert stream.origin_at(3) == DocumentOrigin(0, str(first), 1)
    assert stream.origin_at(4) == DocumentOrigin(1, str(first), 4)
    assert stream.origin_at(9) == DocumentOrigin(2, str(tmp_path / "b.jsonl"), 1)


def _indexed(prefix: Path) -> IndexedStream:
    return IndexedStream(IndexedDataset(prefix))


def _preprocess(*inputs: Path, output: Path) -> Path:
    arguments = ["--input", *map(str, inputs), "--output", str(output), "--tokenizer", "bytes"]
    preprocess(arguments)
    return output


def test_a_preprocessed_document_is_counted_among_those_of_its_input(tmp_path):
    a, b = _lines(tmp_path / "a.jsonl", ["0", "11"]), _lines(tmp_path / "b.jsonl", ["2", "3"])
    both = _indexed(_preprocess(b, a, output=tmp_path / "both"))
    assert both.origin_at(0) == DocumentOrigin(0, str(b), input_index=0)
    assert both.origin_at(3) == DocumentOrigin(1, str(b), input_index=1)
    assert both.origin_at(6) == DocumentOrigin(3, str(a), input_index=1)
    parts = [_preprocess(x, output=tmp_path / x.stem) for x in (a, b)]
    merge([*map(str, parts), "--output", str(tmp_path / "merged")])
    merged = _indexed(tmp_path / "merged")
    assert merged.origin_at(5) == DocumentOrigin(2, str(b), input_index=0)


def test_a_corpus_that_does_not_record_its_inputs_names_the_document_alone(tmp_path):
    texts = [str(n) for n in range(100)]
    whole = _preprocess(_lines(tmp_path / "a.jsonl", texts), output=tmp_path / "whole")
    outputs = ["--train", str(tmp_path / "x"), "--validation", str(tmp_path / "y")]
    split([str(whole), *outputs, "--share", "0.5"])
    assert _indexed(tmp_path / "x").origin_at(0) == DocumentOrigin(0)
