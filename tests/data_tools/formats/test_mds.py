from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.formats import mds
from tests.data_tools.formats.conversions import (
    DOCUMENTS,
    EOD,
    assert_same_files,
    convert,
    corpus,
    documents,
    forget,
    megatron,
    streaming_base,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)
CONFIG: dict[str, Any] = {
    "column_encodings": ["ndarray:uint16"],
    "column_names": ["tokens"],
    "column_sizes": [None],
    "compression": None,
    "format": "mds",
    "hashes": [],
    "size_limit": 67108864,
    "version": 2,
}


def _array(ids: list[int]) -> bytes:
    """A sample of one column ndarray:uint16: its size, kind 4, its length in a byte, the ids."""
    return struct.pack(f"<IBB{len(ids)}H", 2 + 2 * len(ids), 4, len(ids), *ids)


def _shard(samples: list[bytes], config: dict[str, Any] = CONFIG) -> bytes:
    columns = json.dumps(config, sort_keys=True).encode()
    offsets = [4 + 4 * (len(samples) + 1) + len(columns)]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    table = struct.pack(f"<{len(samples) + 2}I", len(samples), *offsets)
    return table + columns + b"".join(samples)


def _write(
    folder: Path, shards: list[tuple[int, bytes]], config: dict[str, Any] = CONFIG, **changes: Any
) -> Path:
    """Shards (number of samples and content) with their index."""
    folder.mkdir(exist_ok=True)
    listed = []
    for number, (count, content) in enumerate(shards):
        name = f"shard.{number:05}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        listed.append({**config, "raw_data": raw, "samples": count, "zip_data": None, **changes})
    (folder / "index.json").write_text(json.dumps({"shards": listed, "version": 2}))
    return folder


def _change(folder: Path, **changes: Any) -> Path:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0].update(changes)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


THEIRS = [(4, _shard([_array(text) for text in DOCUMENTS]))]


def test_our_folder_is_a_shard_and_its_index(tmp_path: Path) -> None:
    ours, output = corpus(tmp_path), tmp_path / "out"
    convert("--from", "megatron", "--to", "mds", ours, "--output", output)
    assert (output / "shard.00000.mds").read_bytes() == THEIRS[0][1]
    theirs = _write(tmp_path / "theirs", THEIRS)
    index = [json.loads((folder / "index.json").read_text()) for folder in (output, theirs)]
    assert index[0] == index[1]
    for folder, given in ((output, []), (theirs, ["--overwrite"])):
        back = megatron(tmp_path, "mds", folder, options=given)
        assert_same_files(back, ours)


@pytest.mark.parametrize("size", [1, 5, 20])
def test_documents_are_kept_at_any_block_and_shard_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(mds, "BLOCK_BYTES", size)
    monkeypatch.setattr(mds, "_SHARD_BYTES", size)
    monkeypatch.setattr(mds, "_COPIED_AT_ONCE", size)
    monkeypatch.setattr("data_tools.formats.raw_files.BLOCK_BYTES", 4)
    ours, output = corpus(tmp_path), tmp_path / "out"
    convert("--from", "megatron", "--to", "mds", ours, "--output", output)
    assert len(list(output.glob("*.mds"))) == {1: 4, 5: 3, 20: 1}[size]
    assert documents(megatron(tmp_path, "mds", output)) == DOCUMENTS


@pytest.mark.parametrize("length", [255, 256, 65_535, 65_536])
def test_lengths_take_one_two_or_four_bytes(tmp_path: Path, length: int) -> None:
    texts = [[1], list(range(1, length + 1)), [2, 3]]
    ours = corpus(tmp_path, texts, eod_id=None, vocab_size=1 << 20)
    convert("--from", "megatron", "--to", "mds", ours, "--output", tmp_path / "out")
    back = megatron(tmp_path, "mds", tmp_path / "out")
    assert documents(back) == texts
    assert IndexedDataset(back).dtype == np.int32


def test_other_columns_and_encodings_are_read(tmp_path: Path) -> None:
    columns = ["ids", "n", "text", "z"]
    config = {**CONFIG, "column_names": columns, "column_sizes": [None, 8, None, None]}
    config["column_encodings"] = ["ndarray", "int", "str", "bytes"]
    samples = []
    for text in DOCUMENTS:
        ids = struct.pack(f"<BBB{len(text)}I", 32, 4, len(text), *text)
        raw = struct.pack(f"<{len(text)}q", *text)
        sizes = struct.pack("<3I", len(ids), 2, len(raw))
        samples.append(sizes + ids + struct.pack("<q", 7) + b"ab" + raw)
    folder = _write(tmp_path / "in", [(4, _shard(samples, config))], config)
    back = megatron(tmp_path, "mds", folder, options=["--column", "ids"])
    assert documents(back) == DOCUMENTS
    assert IndexedDataset(back).dtype == np.int32
    raw_options = ["--column", "z", "--dtype", "int64", "--overwrite"]
    back = megatron(tmp_path, "mds", folder, options=raw_options)
    assert documents(back) == DOCUMENTS
    assert IndexedDataset(back).dtype == np.int64
    with _refused("--dtype", "int64", ("no effect", "ndarray"), "remove"):
        megatron(tmp_path, "mds", folder, options=["--column", "ids", "--dtype", "int64"])
    for name, value, constraint in (
        ("tokens", "'tokens'", "ids, n, text, z"),
        ("text", "str", "integers"),
    ):
        with _refused("index.json", value, constraint, "--column"):
            megatron(tmp_path, "mds", folder, options=["--column", name])
    with _refused("index.json", "'z'", "bytes", ("--dtype", "int64")):
        megatron(tmp_path, "mds", folder, options=["--column", "z"])


def test_arrays_of_a_fixed_shape_are_read(tmp_path: Path) -> None:
    config = {**CONFIG, "column_encodings": ["ndarray:int32:3"], "column_sizes": [12]}
    samples = [struct.pack("<3i", 1, 2, 3), struct.pack("<3i", 4, 5, 6)]
    folder = _write(tmp_path / "in", [(0, _shard([])), (2, _shard(samples, config))], config)
    assert documents(megatron(tmp_path, "mds", folder)) == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("codec", ["zstd:7", "gz", "bz2:9"])
def test_compressed_shards_are_read_and_damaged_ones_refused(tmp_path: Path, codec: str) -> None:
    compress = {"z": zstandard.compress, "g": gzip.compress, "b": bz2.compress}[codec[0]]
    folder = _write(tmp_path / "in", THEIRS)
    (folder / "shard.00000.mds").unlink()
    zipped = folder / "shard.00000.mds.zip"
    zipped.write_bytes(compress(THEIRS[0][1]))
    listed = {"basename": zipped.name, "bytes": 1, "hashes": {}}
    _change(folder, compression=codec, zip_data=listed)
    assert documents(megatron(tmp_path, "mds", folder)) == DOCUMENTS
    content = zipped.read_bytes()
    for damaged in (content[: len(content) // 2], b"nothing of the kind"):
        zipped.write_bytes(damaged)
        with _refused("shard.00000.mds.zip", "", "", "copy"):
            megatron(tmp_path, "mds", folder, options=["--overwrite"])
    _change(folder, compression="br:11")
    with _refused("shard.00000.mds.zip", "br", "zstd, gz, bz2", "decompress"):
        megatron(tmp_path, "mds", folder, options=["--overwrite"])
    _change(folder, compression=codec)
    zipped.unlink()
    with _refused("shard.00000.mds.zip", "file", "index.json", "copy"):
        megatron(tmp_path, "mds", folder, options=["--overwrite"])


def _cut(content: bytes, begin: int, new: bytes) -> bytes:
    return content[:begin] + new + content[begin + len(new) :]


_FIRST = struct.unpack_from("<I", THEIRS[0][1], 4)[0]  # byte of the first sample


@pytest.mark.parametrize(
    ("count", "content", "value", "constraint", "remedy"),
    [
        (5, THEIRS[0][1], "4", "5 expected", "copy"),
        (4, _cut(THEIRS[0][1], 0, b"\0\0\0\4"), str(4 << 24), "4 expected", "copy"),
        (4, _cut(THEIRS[0][1], 8, b"\0\0\0\0"), "bytes", "ascending", "copy"),
        (4, _cut(THEIRS[0][1], _FIRST, b"\xff"), str(_FIRST), "larger", "--column"),
        (4, _cut(THEIRS[0][1], _FIRST + 4, b"\x08"), str(_FIRST), "dimension", "--column"),
        (4, _cut(THEIRS[0][1], _FIRST + 5, b"\x05"), str(_FIRST), "length", "--column"),
        (4, _cut(THEIRS[0][1], _FIRST + 4, b"\x06"), str(_FIRST), "length", "--column"),
    ],
)
def test_damaged_shards_are_refused(
    tmp_path: Path, count: int, content: bytes, value: str, constraint: str, remedy: str
) -> None:
    folder = _write(tmp_path / "in", [(count, content)])
    with _refused("shard.00000.mds", value, constraint, remedy):
        megatron(tmp_path, "mds", folder)
    assert not list(tmp_path.glob("back*"))


def test_cut_changed_and_missing_shards_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", THEIRS)
    shard, content = folder / "shard.00000.mds", THEIRS[0][1]
    shard.write_bytes(content[:-2])
    with _refused("shard.00000.mds", str(len(content) - 2), str(len(content)), "copy"):
        megatron(tmp_path, "mds", folder)
    hashes = {"sha256": hashlib.sha256(content).hexdigest(), "xxh64": "unknown"}
    raw = {"basename": shard.name, "bytes": len(content), "hashes": hashes}
    _change(folder, raw_data=raw)
    shard.write_bytes(content)
    assert documents(megatron(tmp_path, "mds", folder)) == DOCUMENTS
    shard.write_bytes(_cut(content, len(content) - 2, b"\x08"))
    with _refused("shard.00000.mds", "sha256", "expected", "copy"):
        megatron(tmp_path, "mds", folder, options=["--overwrite"])
    shard.unlink()
    with _refused("shard.00000.mds", "file", "index.json", "copy"):
        megatron(tmp_path, "mds", folder, options=["--overwrite"])


@pytest.mark.parametrize(
    ("index", "value", "constraint", "remedy"),
    [
        ("{", "property", "", "copy"),
        ("[]", "list", "dict", "copy"),
        ('{"version": 1, "shards": [{}]}', "1", "2", "again"),
        ('{"version": 2, "shards": []}', "0", "1 or more", "again"),
        ('{"version": 2, "shards": [7]}', "shard", "", "copy"),
        ('{"version": 2, "shards": [{"samples": 1}]}', "'column_names'", "", "copy"),
    ],
)
def test_a_damaged_index_is_refused(
    tmp_path: Path, index: str, value: str, constraint: str, remedy: str
) -> None:
    folder = _write(tmp_path / "in", THEIRS)
    (folder / "index.json").write_text(index)
    with _refused("index.json", value, constraint, remedy):
        megatron(tmp_path, "mds", folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("column_names", [7]),
        ("column_names", "tokens"),
        ("column_encodings", [7]),
        ("column_encodings", {"tokens": "ndarray"}),
        ("column_sizes", {}),
        ("column_sizes", []),
        ("column_sizes", [-1]),
    ],
)
def test_an_index_of_other_types_is_refused(tmp_path: Path, name: str, value: object) -> None:
    folder = _change(_write(tmp_path / "in", THEIRS), **{name: value})
    with _refused("index.json", "shard", "", "copy"):
        megatron(tmp_path, "mds", folder)


def test_an_index_is_needed_and_names_no_file_elsewhere(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", THEIRS)
    raw = {"basename": "../ours.bin", "bytes": 1, "hashes": {}}
    with _refused("index.json", "'../ours.bin'", "in", "one folder"):
        megatron(tmp_path, "mds", _change(folder, raw_data=raw))
    with _refused("index.json", repr("a\0b"), "in", "one folder"):
        megatron(tmp_path, "mds", _change(folder, raw_data={**raw, "basename": "a\0b"}))
    (folder / "index.json").unlink()
    with _refused("index.json", "file", "MDS", "folder"):
        megatron(tmp_path, "mds", folder)


def test_an_error_of_the_system_while_shards_are_read_is_refused(tmp_path: Path) -> None:
    content = THEIRS[0][1]
    folder = _write(tmp_path / "in", THEIRS * 2)
    index = json.loads((folder / "index.json").read_text())
    name = "x" * 300  # which no file can have
    index["shards"][1]["raw_data"] = {"basename": name, "bytes": len(content)}
    (folder / "index.json").write_text(json.dumps(index))
    with _refused(name, "too long", "", "check"):
        megatron(tmp_path, "mds", folder)
    assert not list(tmp_path.glob("back*"))


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
def test_streaming_reads_ours_and_we_read_its_shards(tmp_path: Path) -> None:
    streaming = streaming_base()
    ours = corpus(tmp_path)
    convert("--from", "megatron", "--to", "mds", ours, "--output", tmp_path / "out")
    read = streaming.LocalDataset(str(tmp_path / "out"))
    assert [read[i]["tokens"].tolist() for i in range(len(read))] == DOCUMENTS
    assert read[0]["tokens"].dtype == np.uint16
    with streaming.MDSWriter(out=str(tmp_path / "same"), columns={"tokens": "ndarray:uint16"}) as w:
        for text in DOCUMENTS:
            w.write({"tokens": np.array(text, np.uint16)})
    for name in ("index.json", "shard.00000.mds"):
        theirs = (tmp_path / "same" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == theirs
    texts = [[70_000] * 300, [1, 2], [3]]
    for name, options in (
        ("plain", {"size_limit": 256, "hashes": ["sha256", "xxh64"]}),
        ("zipped", {"compression": "zstd:7"}),
        ("dynamic", {}),
    ):
        encoding = "ndarray" if name == "dynamic" else "ndarray:int32"
        columns = {"tokens": encoding, "a": "int", "z": "str"}
        with streaming.MDSWriter(out=str(tmp_path / name), columns=columns, **options) as w:
            for text in texts:
                w.write({"tokens": np.array(text, np.int32), "a": 1, "z": "text"})
        back = megatron(tmp_path, "mds", tmp_path / name, options=["--overwrite"])
        assert documents(back) == texts
    forget(tmp_path / "out")
    again = megatron(tmp_path, "mds", tmp_path / "out", options=["--overwrite"])
    assert documents(again) == DOCUMENTS
    assert EOD in documents(again)[0]
