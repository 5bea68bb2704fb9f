from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.formats import litdata
from tests.data_tools.formats.conversions import (
    DOCUMENTS,
    EOD,
    assert_same_files,
    convert,
    corpus,
    documents,
    forget,
    megatron,
    package,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def _chunk(texts: list[list[int]], code: str = "H") -> bytes:
    """A chunk: number of items, their offsets, the ids of all."""
    offsets = [4 * (len(texts) + 2)]
    for text in texts:
        offsets.append(offsets[-1] + len(text) * struct.calcsize(f"<{code}"))
    flat = [token for text in texts for token in text]
    head = struct.pack(f"<{len(texts) + 2}I", len(texts), *offsets)
    return head + struct.pack(f"<{len(flat)}{code}", *flat)


def _write(folder: Path, chunks: list[tuple[int, int, bytes]], **config: Any) -> Path:
    """Chunks (items, tokens and content) with their index."""
    folder.mkdir(exist_ok=True)
    listed = []
    for number, (items, tokens, content) in enumerate(chunks):
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(content)
        entry = {"chunk_bytes": len(content), "chunk_size": items, "dim": tokens}
        listed.append({**entry, "filename": name})
    config = {"compression": None, "data_format": ["no_header_numpy:5"], **config}
    (folder / "index.json").write_text(json.dumps({"chunks": listed, "config": config}))
    return folder


def test_our_folder_is_a_chunk_and_its_index(tmp_path: Path) -> None:
    ours, output = corpus(tmp_path), tmp_path / "out"
    convert("--from", "megatron", "--to", "litdata", ours, "--output", output)
    assert (output / "chunk-0-0.bin").read_bytes() == _chunk(DOCUMENTS)
    index = json.loads((output / "index.json").read_text())
    size = {"chunk_bytes": 24 + 28, "chunk_size": 4, "dim": 14}
    assert index["chunks"] == [{**size, "filename": "chunk-0-0.bin"}]
    assert index["config"]["data_format"] == ["no_header_numpy:5"]
    back = megatron(tmp_path, "litdata", output)
    assert_same_files(back, ours)


@pytest.mark.parametrize("size", [1, 9, 1000])
def test_documents_are_kept_at_any_block_and_chunk_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(litdata, "_CHUNK_BYTES", size)
    monkeypatch.setattr("data_tools.formats.raw_files.BLOCK_BYTES", 4)
    ours, output = corpus(tmp_path), tmp_path / "out"
    convert("--from", "megatron", "--to", "litdata", ours, "--output", output)
    assert len(list(output.glob("chunk-0-*.bin"))) == {1: 4, 9: 2, 1000: 1}[size]
    assert documents(megatron(tmp_path, "litdata", output)) == DOCUMENTS


@pytest.mark.parametrize(
    ("data_format", "code", "dtype"),
    [
        ("no_header_tensor:16", "i", "int32"),
        ("no_header_tensor:15", "i", "int32"),
        ("no_header_tensor:18", "q", "int64"),
        ("no_header_tensor:20", "H", "uint16"),
        ("no_header_numpy:2", "i", "int32"),
        ("no_header_numpy:6", "I", "int32"),
    ],
)
def test_the_dtype_is_that_of_its_table(
    tmp_path: Path, data_format: str, code: str, dtype: str
) -> None:
    chunk = (4, 14, _chunk(DOCUMENTS, code))
    folder = _write(tmp_path / "in", [chunk, chunk], data_format=[data_format])
    back = megatron(tmp_path, "litdata", folder)
    assert documents(back) == DOCUMENTS * 2
    assert IndexedDataset(back).dtype.name == dtype


def test_a_chunk_whose_first_document_is_empty_counts_no_tokens(tmp_path: Path) -> None:
    chunk = {"chunk_bytes": 24, "chunk_size": 2, "dim": None, "filename": "chunk-0-0.bin"}
    folder = _write(tmp_path / "in", [(2, 1, _chunk([[], [5, EOD]]))])
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "chunks": [chunk]}))
    with _refused("chunk-0-0.bin", "0", "0 tokens", "--drop-empty"):
        megatron(tmp_path, "litdata", folder)
    back = megatron(tmp_path, "litdata", folder, options=["--drop-empty"])
    assert documents(back) == [[5, EOD]]


@pytest.mark.parametrize(
    ("config", "value", "constraint", "remedy"),
    [
        ({"data_format": ["no_header_tensor:8"]}, "no_header_tensor:8", "integer", "write"),
        ({"data_format": ["jpeg"]}, "jpeg", "no_header_numpy", "write"),
        ({"data_format": ["int", "str"]}, "int|str", "no_header_numpy", "write"),
        ({"compression": "zstd"}, "zstd", "none", "without"),
        ({"encryption": {"level": "chunk"}}, "encryption", "none", "without"),
    ],
)
def test_what_is_no_plain_chunk_of_ids_is_refused(
    tmp_path: Path, config: dict[str, Any], value: str, constraint: str, remedy: str
) -> None:
    folder = _write(tmp_path / "in", [(4, 14, _chunk(DOCUMENTS))], **config)
    with _refused("index.json", value, constraint, remedy):
        megatron(tmp_path, "litdata", folder)


_CONTENT = _chunk(DOCUMENTS)


@pytest.mark.parametrize(
    ("chunk", "value", "constraint", "remedy"),
    [
        ((4, 14, _CONTENT[:-2]), "50", ("52", "byte 20"), "copy"),
        ((4, 14, _CONTENT[:6]), "6", "byte 20", "copy"),
        ((4, 13, _CONTENT), "52", ("13 ids", "uint16"), "copy"),
        ((5, 14, _CONTENT), "4", "5 expected", "copy"),
        ((1 << 70, 14, _CONTENT), "4", f"{1 << 70} expected", "copy"),
        ((-1, 14, _CONTENT), "4", "-1 expected", "copy"),
        ((4, 14, b"\0\0\0\4" + _CONTENT[4:]), str(4 << 24), "4 expected", "copy"),
        ((4, 14, _CONTENT[:8] + b"\0\0\0\0" + _CONTENT[12:]), "0", ("byte 8", "from 24"), "copy"),
        ((4, 14, _CONTENT[:8] + b"\x21" + _CONTENT[9:]), "33", ("byte 8", "from 24"), "copy"),
    ],
)
def test_damaged_chunks_are_refused(
    tmp_path: Path, chunk: tuple[int, int, bytes], value: str, constraint: Any, remedy: str
) -> None:
    folder = _write(tmp_path / "in", [chunk])
    with _refused("chunk-0-0.bin", value, constraint, remedy):
        megatron(tmp_path, "litdata", folder)
    assert not list(tmp_path.glob("back*"))


def test_chunks_must_be_there_and_listed(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", [(4, 14, _CONTENT)])
    (folder / "chunk-0-0.bin").unlink()
    with _refused("chunk-0-0.bin", "file", "such", "index.json"):
        megatron(tmp_path, "litdata", folder)
    (folder / "index.json").write_text('{"chunks": []}')
    with _refused("index.json", "'config'", "chunks", "TokensLoader"):
        megatron(tmp_path, "litdata", folder)
    (folder / "index.json").unlink()
    with _refused("index.json", "file", "litdata", "folder"):
        megatron(tmp_path, "litdata", folder)


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_litdata_reads_ours_and_we_read_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # it keeps a cache there
    package("litdata")
    loaders, cache = package("litdata.streaming.item_loader"), package("litdata.streaming.cache")
    reader = package("litdata.streaming.dataset")
    ours, output = corpus(tmp_path), tmp_path / "out"
    convert("--from", "megatron", "--to", "litdata", ours, "--output", output)
    read = reader.StreamingDataset(str(output), item_loader=loaders.TokensLoader(block_size=7))
    flat = [token for text in DOCUMENTS for token in text]
    assert [read[i].tolist() for i in range(len(read))] == [flat[:7], flat[7:]]

    for name, kind in (("numpy", np.uint16), ("tensor", torch.int32)):
        writer = cache.Cache(
            str(tmp_path / name), item_loader=loaders.TokensLoader(block_size=4), chunk_bytes=60
        )
        for number, text in enumerate(DOCUMENTS):
            ids = torch.tensor(text, dtype=kind) if name == "tensor" else np.array(text, kind)
            writer[number] = ids
        writer.done()
        writer.merge()
        back = megatron(tmp_path, "litdata", tmp_path / name, options=["--overwrite"])
        assert documents(back) == DOCUMENTS
    assert (tmp_path / "numpy" / "chunk-0-0.bin").read_bytes() == _CONTENT
    forget(output)
    again = megatron(tmp_path, "litdata", output, options=["--eod", EOD, "--overwrite"])
    assert documents(again) == DOCUMENTS
