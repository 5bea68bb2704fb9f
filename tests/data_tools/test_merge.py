from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.merge import main, merge
from data_tools.preprocess import main as preprocess
from data_tools.verify import verify
from tests.data_tools.corpora import counting_documents, write_corpus, write_megatron_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def _preprocess(folder: Path, name: str, text: str, license: str) -> str:
    (folder / f"{name}.txt").write_text(text)
    options = ["--tokenizer", "bytes", "--licence", license]  # the spelling of earlier versions
    preprocess(["--input", str(folder / f"{name}.txt"), "--output", str(folder / name), *options])
    return str(folder / name)


def test_merged_corpus_holds_the_documents_in_order(tmp_path: Path) -> None:
    for name, lengths in (("a", [3, 1]), ("b", [2]), ("c", [70_000, 5])):
        write_corpus(tmp_path / name, counting_documents(lengths), num_bytes=10)
    prefixes = [str(tmp_path / name) for name in "abc"]
    info = merge(prefixes, str(tmp_path / "out"))
    assert info is not None
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


def test_sources_and_licenses_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    with _refused(
        "tokenizer_fingerprint", value="u" * 64, constraint="t" * 64, remedy="preprocess"
    ):
        merge(prefixes, str(tmp_path / "out"))
    (tmp_path / "b.json").unlink()
    with _refused("b", value="b.json", constraint="tokenizer", remedy="--tokenizer"):
        merge(prefixes, str(tmp_path / "out"))
    with _refused("corpus", value="given", constraint="1", remedy="two"):
        merge(prefixes[:1], str(tmp_path / "out"))
    with _refused("--output", value=prefixes[0], constraint="corpora to merge", remedy="another"):
        merge([prefixes[0], prefixes[0]], prefixes[0], overwrite=True)


def _documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def test_megatron_corpora_are_merged_without_a_sidecar(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 200, size=n) for n in (3, 1, 40)]
    for name, dtype in (("a", "uint8"), ("b", "uint16")):
        write_megatron_corpus(tmp_path / name, texts, dtype=dtype)
    write_corpus(tmp_path / "out", counting_documents([3]))  # whose .json must not stay
    prefixes = [str(tmp_path / name) for name in "ab"]
    assert merge(prefixes, str(tmp_path / "out"), overwrite=True) is None
    out = IndexedDataset(tmp_path / "out")
    assert (out.info, out.dtype) == (None, np.dtype("<u2"))
    assert _documents(tmp_path / "out") == [text.tolist() for text in texts] * 2


def test_megatron_corpora_get_a_sidecar_with_their_tokenizer(
    tmp_path: Path,
) -> None:
    ours = _preprocess(tmp_path, "ours", "caf\u00e9", "CC0")
    theirs = [np.array([*b"river", 256]), np.array([*"\u00e9".encode(), 256])]
    write_megatron_corpus(tmp_path / "theirs", theirs, dtype="uint16")
    prefixes = [ours, str(tmp_path / "theirs")]
    with _refused("theirs", value="theirs.json", constraint="tokenizer", remedy="--tokenizer"):
        merge(prefixes, str(tmp_path / "out"))
    info = merge(prefixes, str(tmp_path / "out"), tokenizer="bytes")
    assert info is not None
    assert (info.num_bytes, info.eod_id, info.vocab_size) == (5 + 5 + 2, 256, 257)
    assert verify(str(tmp_path / "out"))
    # Not all documents of this one end alike, so that it is another kind of corpus.
    write_megatron_corpus(tmp_path / "theirs", [*theirs, np.array([*b"x"])], dtype="uint16")
    with _refused("theirs", value="eod_id None", constraint=("256", "ours"), remedy="again"):
        merge(prefixes, str(tmp_path / "out"), tokenizer="bytes", overwrite=True)
    with _refused("--eod", value="x", constraint=".json", remedy="remove"):
        merge([ours, ours], str(tmp_path / "out"), eod="x", overwrite=True)


def test_corpora_that_begin_or_end_documents_differently_are_not_merged(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", counting_documents([3]), eod_id=2, bos_ids=(0,))
    write_corpus(tmp_path / "b", counting_documents([3]), eod_id=1, bos_ids=(0,))
    write_corpus(tmp_path / "c", counting_documents([3]), eod_id=2)
    for name, value, constraint in (("b", "eod_id 1", "2"), ("c", "bos_ids []", "[0]")):
        with _refused(name, value, constraint, remedy="again"):
            merge([str(tmp_path / "a"), str(tmp_path / name)], str(tmp_path / "out"))
    write_corpus(
        tmp_path / "d", counting_documents([3]), eod_id=2, bos_ids=(0,), special_tokens="parse"
    )
    info = merge([str(tmp_path / "a"), str(tmp_path / "d")], str(tmp_path / "out"))
    assert info is not None
    assert info.text_rules == (2, (0,), "parse")


def test_a_damaged_corpus_is_not_joined(tmp_path: Path) -> None:
    for name in "ab":
        write_corpus(tmp_path / name, counting_documents([3, 4]))
    content = bytearray((tmp_path / "b.bin").read_bytes())
    content[-2] ^= 1
    (tmp_path / "b.bin").write_bytes(content)
    with _refused("b.bin", value="SHA-256", constraint="expected", remedy="preprocess"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
