"""nanoGPT and llm.c: streams of ids that record no documents."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter
from data_tools.errors import DataError
from data_tools.formats import raw_files
from data_tools.formats.blocks import NO_ENDS, Block, Boundary, cut_by_token, read_ahead
from data_tools.verify import verify
from tests.data_tools.formats.conversions import (
    DOCUMENTS,
    EOD,
    assert_same_files,
    convert,
    corpus,
    documents,
    forget,
    megatron,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)
FLAT = [token for document in DOCUMENTS for token in document]


def _shard(tokens: list[int], *, magic: int = 20240520, version: int = 1, code: str = "H") -> bytes:
    """A shard as llm.c's write_datafile makes it: 256 int32, then the ids."""
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{code}", *tokens)


def test_nanogpt_file_is_the_ids_and_nothing_else(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    convert("--from", "megatron", "--to", "nanogpt", ours, "--output", tmp_path / "train")
    assert (tmp_path / "train.bin").read_bytes() == struct.pack(f"<{len(FLAT)}H", *FLAT)
    # As its training script reads it.
    assert np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r").tolist() == FLAT


@pytest.mark.parametrize("token", [[], ["--eod", EOD]])
def test_nanogpt_comes_back_with_its_documents(tmp_path: Path, token: list[object]) -> None:
    ours = corpus(tmp_path)
    convert("--from", "megatron", "--to", "nanogpt", ours, "--output", tmp_path / "train")
    if token:
        forget(tmp_path / "train")
    back = megatron(tmp_path, "nanogpt", tmp_path / "train", options=token)
    assert documents(back) == DOCUMENTS
    assert_same_files(back, ours)
    first, second = IndexedDataset(ours).info, IndexedDataset(back).info
    assert (second is None) == bool(token)
    if second is not None and first is not None:
        assert second.model_dump(exclude={"command"}) == first.model_dump(exclude={"command"})


def test_what_follows_the_last_end_token_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(struct.pack("<5H", 1, EOD, EOD, 3, 4))
    back = megatron(tmp_path, "nanogpt", tmp_path / "train.bin", options=["--eod", EOD])
    assert documents(back) == [[1, EOD], [EOD], [3, 4]]
    convert("--from", "megatron", "--to", "nanogpt", back, "--output", tmp_path / "a", "--eod", EOD)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "train.bin").read_bytes()


def test_one_document_is_made_only_on_demand(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(struct.pack("<3H", 1, EOD, 3))
    with _refused("--from", "nanogpt", "boundaries", ("--eod", "--bos", "--no-boundaries")):
        megatron(tmp_path, "nanogpt", tmp_path / "train.bin")
    back = megatron(tmp_path, "nanogpt", tmp_path / "train.bin", options=["--no-boundaries"])
    assert documents(back) == [[1, EOD, 3]]


@pytest.mark.parametrize("kind", ["nanogpt", "llmc"])
def test_what_is_recorded_beside_a_stream_does_not_hinder_another_cut(
    tmp_path: Path, kind: str
) -> None:
    ours, out = corpus(tmp_path), tmp_path / "out"
    to = ("--from", "megatron", "--to", kind, ours, "--output", out, "--overwrite")
    convert(*to, "--no-boundaries")
    whole = megatron(tmp_path, kind, out, options=["--no-boundaries"])
    assert documents(whole) == [FLAT]
    assert documents(megatron(tmp_path, kind, out, options=["--eod", EOD, "--overwrite"])) == (
        DOCUMENTS
    )
    convert(*to)
    for options, expected in (
        ([], DOCUMENTS),
        (["--no-boundaries"], [FLAT]),
        (["--eod", 4], [[1, 2, 3, EOD, 4], FLAT[5:]]),
        (["--bos", 4], [[1, 2, 3, EOD], FLAT[4:]]),
    ):
        back = megatron(tmp_path, kind, out, options=[*options, "--overwrite"])
        assert documents(back) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("bos", [False, True])
def test_a_stream_is_cut_alike_at_any_block_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, bos: bool
) -> None:
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 2 * size)
    stream = [EOD, 1, 2, EOD, EOD, 3, 4, 5, EOD, 6]
    (tmp_path / "train.bin").write_bytes(struct.pack("<10H", *stream))
    back = megatron(
        tmp_path, "nanogpt", tmp_path / "train.bin", options=["--bos" if bos else "--eod", EOD]
    )
    expected = (
        [[EOD, 1, 2], [EOD], [EOD, 3, 4, 5], [EOD, 6]]
        if bos
        else [[EOD], [1, 2, EOD], [EOD], [3, 4, 5, EOD], [6]]
    )
    assert documents(back) == expected
    convert(
        *("--from", "megatron", "--to", "llmc", back, "--output", tmp_path / "shards"),
        *("--bos" if bos else "--eod", EOD),
    )
    assert (tmp_path / "shards" / "000000.bin").read_bytes() == _shard(stream)
    again = megatron(tmp_path, "llmc", tmp_path / "shards", options=["--overwrite"])
    assert documents(again) == expected


def test_documents_that_a_stream_would_not_keep_are_refused(tmp_path: Path) -> None:
    to_nanogpt = ("--from", "megatron", "--to", "nanogpt", "--output", tmp_path / "out")
    inside = corpus(tmp_path, [[1, EOD], [2, EOD, 3, EOD]], eod_id=None)
    with _refused("--to", "nanogpt", "boundaries", "--eod"):
        convert(*to_nanogpt, inside)
    with _refused("ours.bin", "9", ("token 1", "document 1"), "--no-boundaries"):
        convert(*to_nanogpt, inside, "--eod", EOD)
    with _refused("ours.bin", "0", ("--eod", "9"), "--no-boundaries"):
        convert("--from", "megatron", "--to", "nanogpt", "--output", tmp_path / "out",
                _corpus(tmp_path / "b", [[1], [2, EOD]]), "--eod", EOD)  # fmt: skip
    with _refused("ours.bin", "1", ("--bos", "id 2"), "--no-boundaries"):
        convert(*to_nanogpt, _corpus(tmp_path / "c", [[EOD, 1], [2, EOD]]), "--bos", EOD)
    with _refused("ours.bin", "9", ("token 2", "document 0", "--bos"), "--no-boundaries"):
        convert(*to_nanogpt, _corpus(tmp_path / "d", [[EOD, 1, EOD], [EOD]]), "--bos", EOD)
    assert not list(tmp_path.glob("out*"))
    convert(*to_nanogpt, inside, "--no-boundaries")
    assert (tmp_path / "out.bin").read_bytes() == struct.pack("<6H", 1, EOD, 2, EOD, 3, EOD)


def _corpus(folder: Path, texts: list[list[int]]) -> Path:
    folder.mkdir()
    return corpus(folder, texts, eod_id=None)


def test_the_first_id_that_does_not_fit_is_named(tmp_path: Path) -> None:
    ours = corpus(tmp_path, [[1, EOD], [2, 65_535, 65_536, EOD]], vocab_size=100_000)
    with _refused("ours.bin", "65536", ("token 2", "document 1", "byte 16", "65536"), "--to"):
        convert("--from", "megatron", "--to", "nanogpt", ours, "--output", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    convert("--from", "megatron", "--to", "llmc", ours, "--output", tmp_path / "shards")
    expected = _shard([1, EOD, 2, 65_535, 65_536, EOD], magic=20240801, version=7, code="I")
    assert (tmp_path / "shards" / "000000.bin").read_bytes() == expected
    back = megatron(tmp_path, "llmc", tmp_path / "shards")
    assert documents(back) == documents(ours)
    with _refused("ours.bin", "65536", ("token 2", "document 1", "--vocab-size"), "tokenizer"):
        convert(
            *("--from", "megatron", "--to", "llmc", ours, "--output", tmp_path / "out"),
            *("--vocab-size", 65_536),
        )


@pytest.mark.parametrize("option", ["--eod", "--bos"])
@pytest.mark.parametrize("token", [8, -1, 70_000])
def test_a_token_that_cuts_nothing_is_refused(tmp_path: Path, option: str, token: int) -> None:
    (tmp_path / "train.bin").write_bytes(struct.pack("<4H", 1, EOD, 3, 4))
    with _refused("train.bin", token, option, "--no-boundaries"):
        megatron(tmp_path, "nanogpt", tmp_path / "train.bin", options=[option, token])
    assert not list(tmp_path.glob("back*"))
    for stream in ([1, EOD], [EOD, 1], [EOD]):  # one document with its token
        (tmp_path / "train.bin").write_bytes(struct.pack(f"<{len(stream)}H", *stream))
        if (stream[0] if option == "--bos" else stream[-1]) == EOD:
            options = [option, EOD, "--overwrite"]
            back = megatron(tmp_path, "nanogpt", tmp_path / "train.bin", options=options)
            assert documents(back) == [stream]


def test_half_an_id_and_files_that_are_missing_or_empty_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"\x01\x00\x02")
    (tmp_path / "empty.bin").touch()
    for name, value, constraint, remedy in (
        ("odd.bin", "3", "2 bytes", "--dtype"),
        ("empty.bin", "0", "ids", "again"),
        ("none.bin", "file", "such", "check"),
    ):
        with _refused(name, value, constraint, remedy):
            megatron(tmp_path, "nanogpt", tmp_path / name, options=["--eod", EOD])
    assert not list(tmp_path.glob("back*"))


def test_shards_are_cut_within_a_document_and_read_as_one_stream(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    convert(
        *("--from", "megatron", "--to", "llmc", ours, "--output", tmp_path / "shards"),
        *("--shard-tokens", 5),
    )
    files = sorted((tmp_path / "shards").iterdir())
    assert [file.name for file in files] == ["000000.bin", "000001.bin", "000002.bin"]
    pieces = (FLAT[0:5], FLAT[5:10], FLAT[10:])
    assert [file.read_bytes() for file in files] == [_shard(piece) for piece in pieces]
    assert documents(megatron(tmp_path, "llmc", tmp_path / "shards")) == DOCUMENTS
    forget(tmp_path / "shards")
    back = megatron(tmp_path, "llmc", *files, options=["--eod", EOD, "--overwrite"])
    assert documents(back) == DOCUMENTS


def test_shards_of_llm_c_begin_documents_with_the_end_token(tmp_path: Path) -> None:
    (tmp_path / "a_000000.bin").write_bytes(_shard([50_256, 1, 2, 50_256, 3]))
    (tmp_path / "a_000001.bin").write_bytes(_shard([4, 50_256, 5]))
    inputs = [tmp_path / "a_000000.bin", tmp_path / "a_000001.bin"]
    back = megatron(tmp_path, "llmc", *inputs, options=["--bos", 50_256])
    assert documents(back) == [[50_256, 1, 2], [50_256, 3, 4], [50_256, 5]]


@pytest.mark.parametrize(
    ("content", "value", "constraint", "remedy"),
    [
        (b"\x00" * 100, "100", "1024", "nanogpt"),
        (b"\x05" * 2000, "84215045", "20240520", "nanogpt"),
        (_shard([1, 2])[:-2], "2", ("byte 8", "1 of uint16"), "copy"),
        (_shard([1, 2]) + b"\x00\x00", "2", ("byte 8", "3 of uint16"), "copy"),
        (_shard([]), "1024", "header", "copy"),
        (_shard([1], version=2), "2", ("byte 4", "1 expected"), "again"),
        (_shard([1], magic=20240522), "20240522", "multiple-choice", "corpus"),
        (struct.pack(">256i", 20240520, 1, 1, *[0] * 253) + b"\0\1", "150", "big-endian", "swap"),
    ],
)
def test_damaged_and_foreign_shards_are_refused(
    tmp_path: Path, content: bytes, value: str, constraint: str, remedy: str
) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    if value == "150":
        value = str(struct.unpack("<i", content[:4])[0])
    if content == _shard([]):
        value, constraint, remedy = "0", ("byte 8", "0 of uint16"), "copy"  # type: ignore[assignment]
    with _refused("a.bin", value, constraint, remedy):
        megatron(tmp_path, "llmc", tmp_path / "a.bin", options=["--eod", EOD])


def test_shards_of_two_dtypes_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(_shard([1]))
    (tmp_path / "b.bin").write_bytes(_shard([1], magic=20240801, version=7, code="I"))
    with _refused("b.bin", "uint32", ("uint16", "a.bin"), "apart"):
        megatron(tmp_path, "llmc", tmp_path / "a.bin", tmp_path / "b.bin", options=["--eod", EOD])


def test_a_changed_file_is_found_by_its_checksum(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    convert("--from", "megatron", "--to", "nanogpt", ours, "--output", tmp_path / "train")
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[0] ^= 4
    (tmp_path / "train.bin").write_bytes(content)
    with _refused("train.bin", "checksum", "expected", "copy"):
        megatron(tmp_path, "nanogpt", tmp_path / "train")
    assert not list(tmp_path.glob("back*"))


def test_modes_of_a_multimodal_corpus_are_not_lost(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    with open(tmp_path / "ours.idx", "ab") as index:
        index.write(b"\0" * len(DOCUMENTS))
    size = (tmp_path / "ours.idx").stat().st_size
    with _refused("ours.idx", size, (str(size - 4), "modes"), "text"):
        convert("--from", "megatron", "--to", "olmo", ours, "--output", tmp_path / "out")


def test_a_manifest_that_is_damaged_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    convert("--from", "megatron", "--to", "nanogpt", ours, "--output", tmp_path / "train")
    path = tmp_path / "train.corpus.json"
    content = path.read_text()
    for old, new, value, constraint, remedy in (
        ('"kind": "nanogpt"', '"kind": "olmo"', "olmo", "nanogpt expected", "--from olmo"),
        ('"version": 1', '"version": 2', "2", "1 and", "delete"),
        ("xxh3_128:", "crc32:", "ids_hash", "xxh3_128", "delete"),
        ("{", "", "file", "JSON", "delete"),
    ):
        assert old in content
        path.write_text(content.replace(old, new, 1))
        with _refused("train.corpus.json", value, constraint, remedy):
            megatron(tmp_path, "nanogpt", tmp_path / "train")
    path.write_text(content.replace('"num_documents": 4', '"num_documents": 5'))
    with _refused("train.bin", "documents", ("4 found", "5 expected"), "copy"):
        megatron(tmp_path, "nanogpt", tmp_path / "train")


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    ours, out = corpus(tmp_path), tmp_path / "out"
    for options, name, value in (
        (["--to", "nanogpt", "--shard-tokens", 5], "--shard-tokens", "5"),
        (["--to", "nanogpt", "--dtype", "uint16"], "--dtype", "uint16"),
        (["--to", "nanogpt", "--column", "a"], "--column", "a"),
        (["--to", "megatron", "--bos", 1], "--bos", "effect"),
        (["--to", "megatron", "--no-boundaries"], "--no-boundaries", "effect"),
    ):
        with _refused(name, value, "no effect", "remove"):
            convert("--from", "megatron", ours, "--output", out, *options)
    with _refused("--eod", "2", "one", "keep"):
        convert("--from", "megatron", "--to", "llmc", ours, "--output", out, "--eod", 9, "--bos", 9)
    llmc = ("--from", "megatron", "--to", "llmc", ours, "--output", out)
    for number in (0, -1):
        with _refused("--shard-tokens", number, "2147483647", "leave"):
            convert(*llmc, "--shard-tokens", number)
        with _refused("--vocab-size", number, "1 or more", "raise"):
            convert(*llmc, "--vocab-size", number)


def test_an_output_is_replaced_only_on_demand(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    for kind, name in (("nanogpt", "train"), ("llmc", "shards")):
        arguments = ("--from", "megatron", "--to", kind, ours, "--output", tmp_path / name)
        convert(*arguments)
        with _refused(name, "exists", "", "--overwrite"):
            convert(*arguments)
        convert(*arguments, "--overwrite")
        assert documents(megatron(tmp_path, kind, tmp_path / name, options=["--overwrite"]))
    assert not list(tmp_path.glob("*.partial"))


def test_a_tokenizer_gives_the_corpus_its_sidecar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = [*b"caf\xc3\xa9", 256, *b"no", 256]
    (tmp_path / "train.bin").write_bytes(struct.pack(f"<{len(stream)}H", *stream))
    options = ["--eod", 256, "--tokenizer", "bytes"]
    back = megatron(tmp_path, "nanogpt", tmp_path / "train.bin", options=options)
    info = IndexedDataset(back).info
    assert info is not None
    assert (info.eod_id, info.num_bytes, info.vocab_size, info.max_token_id) == (256, 7, 257, 256)
    assert any("checksums equal" in line for line in verify(str(back)))
    convert("--from", "megatron", "--to", "llmc", back, "--output", tmp_path / "shards")
    with _refused("--tokenizer", "bytes", "bytes", "remove"):
        megatron(tmp_path, "llmc", tmp_path / "shards", options=["--tokenizer", "bytes"])
    with _refused("--tokenizer", "bytes", "llmc", "remove"):
        convert(
            *("--from", "nanogpt", "--to", "llmc", tmp_path / "train.bin", *options),
            *("--output", tmp_path / "no"),
        )
    (tmp_path / "train.bin").write_bytes(struct.pack("<2H", 300, 256))
    with _refused("train.bin", "300", ("token 0", "257", "--tokenizer"), "tokenizer"):
        megatron(tmp_path, "nanogpt", tmp_path / "train.bin", options=[*options, "--overwrite"])
    assert documents(back) == [stream[:6], stream[6:]]


def test_what_a_killed_conversion_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    (tmp_path / "shards.partial").mkdir()
    (tmp_path / "shards.partial" / "000007.bin").write_bytes(_shard([1]))
    (tmp_path / "train.bin.partial").write_bytes(b"\1\0" * 99)
    for kind, name in (("llmc", "shards"), ("nanogpt", "train")):
        with _refused(name, "such", "", "check"):
            megatron(tmp_path, kind, tmp_path / name, options=["--eod", EOD])
        convert("--from", "megatron", "--to", kind, ours, "--output", tmp_path / name)
        back = megatron(tmp_path, kind, tmp_path / name, options=["--overwrite"])
        assert documents(back) == DOCUMENTS
    assert not list(tmp_path.glob("*.partial"))


def test_a_writer_takes_a_document_in_pieces(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", vocab_size=100) as writer:
        writer.add_block(np.array([1, 2]), np.array([], int))
        writer.add_block(np.array([3, 4, 5]), np.array([1, 2]))
        writer.add_block(np.array([6]), np.array([1]))
        with _refused("a", "200", ("token 1", "document 3"), "vocabulary"):
            writer.add_block(np.array([7, 200]), np.array([2]))
        writer.finish_without_info()
    assert documents(tmp_path / "a") == [[1, 2, 3], [4], [5, 6]]


def test_no_more_than_two_blocks_are_read_ahead() -> None:
    read = 0

    def blocks() -> Iterator[Block]:
        nonlocal read
        while read < 8:
            read += 1
            yield Block(np.zeros(1, int), NO_ENDS, Path("a"))

    for written, _ in enumerate(read_ahead(blocks())):
        assert written < read <= written + 2
    assert read == 8


def test_an_end_between_two_blocks_is_the_first_ones() -> None:
    parts = [(np.array([1, 9, 2]), 0, Path("a")), (np.array([9, 3]), 6, Path("a"))]
    cut = list(cut_by_token(parts, Boundary(bos=9)))
    assert [block.ends.tolist() for block in cut] == [[1, 3], [2]]
