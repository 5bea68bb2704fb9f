from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter
from data_tools.errors import DataError
from data_tools.preprocess import main as preprocess
from data_tools.train_tokenizer import train_tokenizer
from data_tools.verify import main, verify
from tests.data_tools.corpora import counting_documents, write_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_verify_finds_every_flipped_bit(tmp_path: Path, suffix: str) -> None:
    prefix = tmp_path / "corpus"
    write_corpus(prefix, counting_documents([3, 4, 5]), vocab_size=60_000)
    path = prefix.with_suffix(suffix)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            verify(str(prefix))


def test_id_outside_the_vocabulary_is_found_with_its_location(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([30, 40, 50]), vocab_size=1000)
    assert verify(str(tmp_path / "c"), vocab_size=120)[1] == "ids in [0, 120), largest 119"
    constraint = ("token 30 of document 2", "[0, 100)")
    with _refused("c.bin", value=100, constraint=constraint, remedy="again"):
        verify(str(tmp_path / "c"), vocab_size=100)


def test_corpus_without_a_sidecar_says_what_was_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "c", counting_documents([3]))
    (tmp_path / "c.json").unlink()
    main([str(tmp_path / "c")])
    shown = capsys.readouterr().out
    assert "not compared with a vocabulary: pass --vocab-size N" in shown
    assert "no .json beside it: no checksums to compare with" in shown
    np.memmap(tmp_path / "c.bin", dtype="<i4", mode="r+")[1] = -7
    with _refused("c.bin", value=-7, constraint=("token 1", "document 0"), remedy="again"):
        main([str(tmp_path / "c")])


def test_sidecar_that_lies_about_the_largest_id_is_found(tmp_path: Path) -> None:
    info = write_corpus(tmp_path / "c", counting_documents([3]))
    sidecar = tmp_path / "c.json"
    sidecar.write_bytes(info.model_copy(update={"max_token_id": 1}).to_bytes())
    with _refused("c.json", value=1, constraint=("largest id", "2"), remedy="again"):
        verify(str(tmp_path / "c"))


def test_documents_of_any_size_are_read_in_chunks(tmp_path: Path) -> None:
    lengths = [1, 6_000_000, 2, 3, 5_000_000, *([1] * 70_000)]
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=2) as writer:
        writer.add_documents(np.ones(sum(lengths), dtype=np.uint8), np.array(lengths))
        writer.finish(
            tokenizer="t", tokenizer_fingerprint="f", eod_id=None, num_bytes=1, command=""
        )
    assert "checksums equal" in verify(str(tmp_path / "c"))


def test_edited_sidecar_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([3]))
    sidecar = tmp_path / "c.json"
    sidecar.write_text(sidecar.read_text().replace('"a test"', '"a text"'))
    with _refused("c.json", value="checksum", constraint="content", remedy=("again", "delete")):
        IndexedDataset(tmp_path / "c")


def test_sidecar_of_the_version_without_a_checksum_is_read(tmp_path: Path) -> None:
    info = write_corpus(tmp_path / "c", counting_documents([3]))
    old = info.model_copy(update={"version": 1})
    (tmp_path / "c.json").write_text(old.model_dump_json(exclude={"left_out_sha256"}))
    assert IndexedDataset(tmp_path / "c").info == old
    assert "checksums equal" in verify(str(tmp_path / "c"))


def test_a_replaced_tokenizer_file_is_detected(tmp_path: Path) -> None:
    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.model"
    text.write_text("a corpus of its own, in few words\n" * 200)
    train_tokenizer([str(text)], str(tokenizer), vocab_size=300)
    arguments = ["--input", str(text), "--output", str(tmp_path / "c"), "--workers", "1"]
    preprocess([*arguments, "--tokenizer", str(tokenizer)])
    assert f"tokenizer {tokenizer} equal" in verify(str(tmp_path / "c"))
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    with assert_refused(
        "tokenizer.model",
        value="SHA-256",
        constraint="expected",
        remedy=("restore", "preprocess"),
        error=DataError,
    ):
        verify(str(tmp_path / "c"))
    tokenizer.unlink()
    assert f"tokenizer {tokenizer} not found: not compared" in verify(str(tmp_path / "c"))
