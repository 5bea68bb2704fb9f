from __future__ import annotations

import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data_tools.arrays import bisect_right
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed import HEADER, MAGIC, IndexedDataset
from data_tools.errors import DataError
from data_tools.verify import verify
from tests.data_tools.corpora import counting_documents, write_corpus, write_counting_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


@pytest.fixture(scope="module")
def megatron_indexed() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("vocab_size", [200, 50_000, 65_536, 200_000])
def test_corpus_of_ours_opens_in_megatron(
    tmp_path: Path, megatron_indexed: ModuleType, vocab_size: int
) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocab_size, size=n) for n in (3, 1, 40, 7)]
    documents[2][0] = vocab_size - 1
    write_corpus(tmp_path / "c", documents, vocab_size=vocab_size)
    theirs = megatron_indexed.IndexedDataset(str(tmp_path / "c"))
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    for index, document in enumerate(documents):
        assert theirs[index].tolist() == document.tolist()


def test_corpus_of_megatron_opens_here(tmp_path: Path, megatron_indexed: ModuleType) -> None:
    import torch

    documents = counting_documents([5, 1, 30, 2])
    builder = megatron_indexed.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    # A document of two sequences, as Megatron makes when it splits sentences.
    builder.add_document(torch.tensor(np.concatenate(documents[:2])), [5, 1])
    for document in documents[2:]:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "c.idx"))
    ours = IndexedDataset(tmp_path / "c")
    verify(str(tmp_path / "c"))
    assert (ours.num_sequences, ours.num_documents, ours.num_tokens) == (4, 3, 38)
    assert ours.document(0).tolist() == list(range(6))
    assert ours.document(2).tolist() == documents[3].tolist()
    assert ours.document_starts(np.array([0]), 38)[0].tolist() == [6, 36]
    assert ours.info is None


def test_document_starts_equal_a_plain_loop(tmp_path: Path) -> None:
    lengths = [4, 1, 1, 9, 2, 30, 5, 1]
    write_corpus(tmp_path / "c", counting_documents(lengths))
    dataset = IndexedDataset(tmp_path / "c")
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    for length in (1, 2, 7, 20):
        begins = np.arange(sum(lengths) - length + 1)
        found = dataset.document_starts(begins, length)
        for begin, positions in zip(begins.tolist(), found, strict=True):
            assert positions.tolist() == [s for s in starts if begin < s < begin + length]


@pytest.mark.parametrize("read_at_once", [0, 10**6])
def test_bisect_equals_searchsorted(read_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.arrays._READ_AT_ONCE", read_at_once)
    generator = np.random.default_rng(0)
    values = np.sort(generator.integers(0, 50, size=77))
    keys = np.arange(-2, 53)
    assert bisect_right(values, keys).tolist() == np.searchsorted(values, keys, "right").tolist()
    assert bisect_right(values[:1], keys).tolist() == (keys >= values[0]).astype(int).tolist()


def test_corpora_have_different_fingerprints_and_copies_the_same(tmp_path: Path) -> None:
    documents = counting_documents([100, 50])
    write_corpus(tmp_path / "a", documents)
    write_corpus(tmp_path / "copy", documents)
    write_corpus(tmp_path / "other_cut", counting_documents([50, 50, 50]))
    documents[0] = documents[0][::-1]
    write_corpus(tmp_path / "other_ids", documents)
    names = ("a", "copy", "other_cut", "other_ids")
    prints = [IndexedDataset(tmp_path / name).fingerprint for name in names]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def _overwrite(position: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + data + content[position + len(data) :]


_NUM_DOCUMENTS = 100
_OFFSETS_AT = HEADER.size + 4 * _NUM_DOCUMENTS
_BOUNDS_AT = HEADER.size + 12 * _NUM_DOCUMENTS


def _rewritten(**changes: int) -> Callable[[bytes], bytes]:
    """The sidecar with other values, and their checksum."""
    return lambda content: (
        CorpusInfo.model_validate_json(content).model_copy(update=changes).to_bytes()
    )


@pytest.mark.parametrize(
    ("suffix", "damage", "parts"),
    [
        ("idx", lambda content: b"", ("corpus.idx", "empty", "empty")),
        ("idx", lambda content: content[:20], ("corpus.idx", 20, "34")),
        ("idx", lambda content: content[:-1], ("corpus.idx", 2041, ("2042", "100"))),
        ("idx", lambda content: content + b"x", ("corpus.idx", 2043, ("2042", "100"))),
        ("idx", _overwrite(0, b"TNTIDX\0\0\0"), ("corpus.idx", "magic", ("TNTIDX", "MMIDIDX"))),
        ("idx", _overwrite(9, struct.pack("<Q", 2)), ("corpus.idx", 2, ("version", "1"))),
        ("idx", _overwrite(17, b"\x63"), ("corpus.idx", 99, ("dtype", "uint16"))),
        ("idx", _overwrite(17, b"\x07"), ("corpus.idx", 7, ("float32", "uint16"))),
        ("idx", _overwrite(17, b"\x01"), ("corpus.bin", 4000, ("3980", "corpus.idx"))),
        ("idx", _overwrite(18, struct.pack("<Q", 2**63)), ("corpus.idx", 2042, f"{2**63}")),
        ("idx", _overwrite(_OFFSETS_AT, struct.pack("<q", 2)), ("corpus.idx", "offset", "")),
        ("idx", _overwrite(_OFFSETS_AT + 80, struct.pack("<q", -8)), ("corpus.idx", "offset", "")),
        ("idx", _overwrite(_BOUNDS_AT, struct.pack("<q", 1)), ("corpus.idx", "bounds", ())),
        ("bin", lambda content: b"", ("corpus.bin", "empty", ())),
        ("bin", lambda content: content[:-2], ("corpus.bin", 3998, ("4000", "corpus.idx"))),
        ("bin", lambda content: content * 2, ("corpus.bin", 8000, ("4000", "corpus.idx"))),
        ("json", lambda content: b"{", ("corpus.json", "JSON", ())),
        ("json", lambda content: b'{"version": 1}', ("corpus.json", "tokenizer", "Field required")),
        ("json", lambda content: content.replace(b'"num_documents": 100', b'"num_documents": 9'),
         ("corpus.json", "checksum", ())),
        ("json", _rewritten(num_documents=9), ("corpus.json", 9, ("100", "uint16"))),
        ("json", _rewritten(version=3), ("corpus.json", 3, ("version", "2"))),
    ],
)  # fmt: skip
def test_damaged_file_is_refused_when_opened(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes], parts: tuple
) -> None:
    prefix = tmp_path / "corpus"
    write_corpus(prefix, counting_documents([20] * _NUM_DOCUMENTS), vocab_size=60_000)
    verify(str(prefix))
    path = prefix.with_suffix(f".{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    name, value, constraint = parts
    with _refused(str(path.parent / name), value, constraint, remedy="preprocess"):
        IndexedDataset(prefix)


def test_tokens_that_belong_to_no_document_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    write_corpus(prefix, counting_documents([5]), vocab_size=60_000)
    index = bytearray((tmp_path / "corpus.idx").read_bytes())
    struct.pack_into("<q", index, HEADER.size + 4, 2)  # the only document begins a token later
    (tmp_path / "corpus.idx").write_bytes(index)
    (tmp_path / "corpus.bin").write_bytes(bytes(2) + (tmp_path / "corpus.bin").read_bytes())
    with _refused("corpus.idx", value="offset", constraint="previous", remedy="preprocess"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_refused(tmp_path: Path, suffix: str) -> None:
    prefix = write_counting_corpus(tmp_path / "corpus", 100)
    prefix.with_suffix(suffix).unlink()
    with _refused(f"corpus{suffix}", value="no such file", constraint="no", remedy="preprocess"):
        IndexedDataset(prefix)


def test_index_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8))
    (tmp_path / "c.bin").write_bytes(b"")
    with _refused("c.idx", value="documents", constraint="no", remedy="preprocess"):
        IndexedDataset(tmp_path / "c")


def test_two_billion_tokens_open_in_little_memory(tmp_path: Path) -> None:
    """Also reads windows; in a process of its own, whose peak memory is all of Python's."""
    num_documents, length = 2_000_000, 1000
    with open(tmp_path / "c.bin", "wb") as file:
        file.truncate(2 * num_documents * length)  # sparse: takes no room on the disk
    with open(tmp_path / "c.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, num_documents, num_documents + 1))
        file.write(np.full(num_documents, length, dtype="<i4"))
        file.write(np.arange(num_documents, dtype="<i8") * 2 * length)
        file.write(np.arange(num_documents + 1, dtype="<i8"))
    program = f"""
import re
import numpy as np
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed import IndexedStream
from data_tools.sampling.token_dataset import TokenDataset
stream = IndexedStream(IndexedDataset({str(tmp_path / "c")!r}))
dataset = TokenDataset(
    stream, name="c", sequence_length=2048, seed=0, reset_at_documents=True
)
windows = dataset.read(dataset.locate(2048 * np.arange(100)), length=2048)
print(dataset.num_windows, int(windows.segment_ids.max()))
print(stream.fingerprint)
# ru_maxrss would be the parent's where that is larger.
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    windows, segments, _, peak_kilobytes = done.stdout.split()
    assert int(windows) == (num_documents * length - 1) // 2048
    assert int(segments) in (2, 3)
    assert int(peak_kilobytes) < 200 * 1024
