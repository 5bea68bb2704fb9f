from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.indexed import IndexedDataset
from data_tools.merge import main, merge
from data_tools.preprocess import main as preprocess
from tests.data_tools.corpora import counting_documents, write_corpus


def _preprocess(folder: Path, name: str, text: str, licence: str) -> str:
    (folder / f"{name}.txt").write_text(text)
    options = ["--tokenizer", "bytes", "--licence", licence]
    preprocess(["--input", str(folder / f"{name}.txt"), "--output", str(folder / name), *options])
    return str(folder / name)


def test_merged_corpus_holds_the_documents_in_order(tmp_path: Path) -> None:
    for name, lengths in (("a", [3, 1]), ("b", [2]), ("c", [70_000, 5])):
        write_corpus(tmp_path / name, counting_documents(lengths), num_bytes=10)
    prefixes = [str(tmp_path / name) for name in "abc"]
    info = merge(prefixes, str(tmp_path / "out"))
    out = IndexedDataset(tmp_path / "out")
    documents = [
        dataset.document(i)
        for dataset in map(IndexedDataset, prefixes)
        for i in range(dataset.num_documents)
    ]
    assert out.num_documents == len(documents) == 5
    for index, document in enumerate(documents):
        assert np.array_equal(out.document(index), document)
    assert (info.num_tokens, info.num_bytes) == (70_011, 30)


def test_sources_and_licences_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefixes = [
        _preprocess(tmp_path, "a", "one", "CC0"),
        _preprocess(tmp_path, "b", "two", "MIT"),
    ]
    main([*prefixes, "--output", str(tmp_path / "out")])
    assert "2 documents, 8 tokens (uint16)" in capsys.readouterr().out
    info = IndexedDataset(tmp_path / "out").info
    assert info is not None
    assert info.licence == "CC0; MIT"
    assert [source.name for source in info.sources] == [f"{prefix}.txt" for prefix in prefixes]


def test_corpora_of_two_tokenizers_are_not_merged(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", counting_documents([3]))
    write_corpus(tmp_path / "b", counting_documents([3]), tokenizer_fingerprint="u" * 64)
    prefixes = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(DataError, match=r"b: tokenizer_fingerprint u+ found, t+ expected as in"):
        merge(prefixes, str(tmp_path / "out"))
    (tmp_path / "b.json").unlink()
    with pytest.raises(DataError, match=r"b: no b.json beside it"):
        merge(prefixes, str(tmp_path / "out"))
    with pytest.raises(DataError, match="1 corpus given; name two or more"):
        merge(prefixes[:1], str(tmp_path / "out"))
    with pytest.raises(DataError, match="is one of the corpora to merge"):
        merge([prefixes[0], prefixes[0]], prefixes[0], overwrite=True)


def test_a_damaged_corpus_is_not_joined(tmp_path: Path) -> None:
    for name in "ab":
        write_corpus(tmp_path / name, counting_documents([3, 4]))
    content = bytearray((tmp_path / "b.bin").read_bytes())
    content[-2] ^= 1
    (tmp_path / "b.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"b.bin: SHA-256 .* found, .* expected; it is damaged"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
