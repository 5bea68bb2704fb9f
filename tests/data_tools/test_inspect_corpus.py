from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.inspect_corpus import document_lengths, duplicate_share, main
from data_tools.preprocess import main as preprocess
from tests.data_tools.corpora import counting_documents, write_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, text in (("a", "one text"), ("b", "another"), ("c", "one text"), ("d", "x" * 99)):
        (tmp_path / f"{name}.txt").write_text(text)
    preprocess(["--input", str(tmp_path), "--output", str(tmp_path / "c"), "--tokenizer", "bytes"])
    return tmp_path / "c"


def test_report_shows_counts_lengths_duplicates_and_texts(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(corpus), "--samples", "4"])
    report = capsys.readouterr().out
    assert "documents     4" in report
    assert "tokens        126 (uint16)" in report
    assert "min 8 " in report
    assert "max 100 tokens" in report
    assert "122 bytes, 0.968 bytes per token" in report
    assert "257 ids, largest used 256" in report
    assert "25.00% of the first 4 documents repeat an earlier one" in report
    assert "document 1: 'another'" in report
    assert f"source        {corpus.parent}: 4 documents, 126 tokens" in report


def test_lengths_and_duplicates_equal_a_plain_count(tmp_path: Path) -> None:
    documents = counting_documents([3, 1, 7]) * 2
    write_corpus(tmp_path / "c", documents)
    dataset = IndexedDataset(tmp_path / "c")
    assert document_lengths(dataset).tolist() == [3, 1, 7, 3, 1, 7]
    assert duplicate_share(dataset, 6) == 0.5
    assert duplicate_share(dataset, 3) == 0.0


def test_corpus_without_a_sidecar_is_shown_as_ids(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.with_suffix(".json").unlink()
    main([str(corpus), "--samples", "4"])
    report = capsys.readouterr().out
    assert "no .json beside it" in report
    assert "document 1: ids [97, 110, 111" in report
    main([str(corpus), "--samples", "4", "--tokenizer", "bytes"])
    assert "document 1: 'another'" in capsys.readouterr().out


def test_another_tokenizer_than_the_corpus_was_made_with_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([3]), tokenizer_fingerprint="f" * 64)
    with _refused(
        "--tokenizer", value="bytes", constraint="not the tokenizer", remedy="tokenizer.model"
    ):
        main([str(tmp_path / "c"), "--tokenizer", "bytes"])


def test_histogram_is_a_png(corpus: Path, tmp_path: Path) -> None:
    main([str(corpus), "--histogram", str(tmp_path / "lengths.png")])
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with _refused("--histogram", value="lengths.jpg", constraint=".png", remedy="rename"):
        main([str(corpus), "--histogram", "lengths.jpg"])


@pytest.mark.parametrize("option", ["--histogram", "--samples", "--seed", "--max-documents"])
def test_options_of_a_corpus_are_refused_beside_a_run(option: str) -> None:
    with _refused(option, value="0", constraint="--run runs/a", remedy="remove"):
        main(["--run", "runs/a", "--steps", "1:2", option, "0"])
