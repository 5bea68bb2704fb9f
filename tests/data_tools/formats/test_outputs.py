"""Inputs and outputs of conversions, whatever the format."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from data_tools.errors import DataError
from data_tools.formats.kinds import KINDS
from data_tools.formats.manifest import manifest_path
from data_tools.preprocessing.arrow_files import row_groups
from tests.data_tools.formats.conversions import (
    DOCUMENTS,
    EOD,
    convert,
    corpus,
    documents,
    megatron,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def test_an_output_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    for output in ("", ".", "..", "/"):
        for kind in ("megatron", "nanogpt", "llmc"):
            with _refused("--output", repr(output), "name", "corpus"):
                convert("--from", "megatron", "--to", kind, ours, "--output", output, "--overwrite")
    with _refused("INPUT", "''", "path", "pass"):
        megatron(tmp_path, "llmc", "")
    convert("--from", "megatron", "--to", "llmc", ours, "--output", "shards")
    monkeypatch.chdir(tmp_path / "shards")
    assert documents(megatron(tmp_path, "llmc", ".")) == DOCUMENTS


def test_an_input_is_read_once_and_not_replaced(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    with _refused("ours.bin", "twice", "", "remove"):
        megatron(tmp_path, "megatron", ours, tmp_path / ".." / tmp_path.name / "ours")
    for suffix in ("bin", "idx"):
        with _refused(f"ours.{suffix}", "file", ".idx", str(ours)):
            megatron(tmp_path, "megatron", f"{ours}.{suffix}")
    for kind, output in (("nanogpt", ours), ("megatron", ours), ("llmc", tmp_path)):
        given = ("--from", "megatron", "--to", kind, ours, "--output", output, "--overwrite")
        with _refused("ours.bin", "input", str(output), "another"):
            convert(*given)
    assert documents(ours) == DOCUMENTS


def test_a_folder_that_no_conversion_wrote_is_not_deleted(tmp_path: Path) -> None:
    ours, mine = corpus(tmp_path), tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").touch()
    given = ("--from", "megatron", "--to", "llmc", ours, "--overwrite", "--output")
    with _refused("mine", "mine.corpus.json", "--overwrite", "delete"):
        convert(*given, mine)
    (tmp_path / "train.bin").mkdir()
    with _refused("train.bin", "folder", "file", "another"):
        convert("--from", "megatron", "--to", "nanogpt", ours, "--overwrite", "--output",
                tmp_path / "train")  # fmt: skip
    assert list(mine.iterdir()) == [mine / "notes"]
    (mine / "notes").unlink()
    convert(*given, mine)
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "link.corpus.json").symlink_to(tmp_path / "mine.corpus.json")
    convert(*given, tmp_path / "link")  # what it points to is kept
    assert [(tmp_path / name / "000000.bin").is_file() for name in ("mine", "link")] == [True] * 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["nanogpt", "llmc"])
def test_an_output_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Before any operation on the names of files, it is the old one, the new one or not there."""
    ours, here, new = corpus(tmp_path), tmp_path / "here", [[1, EOD], [2, EOD]]
    to = ("--to", kind, "--output", here / "out", "--eod", EOD, "--overwrite", "--from", "megatron")
    (tmp_path / "other").mkdir()
    other = corpus(tmp_path / "other", new)
    convert(*to, ours, *(["--shard-tokens", 7] if kind == "llmc" else []))
    states: list[Path] = []

    def kept_before(operation: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            states.append(shutil.copytree(here, tmp_path / f"state{len(states)}"))
            operation(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, kept_before(getattr(os, name)))
        convert(*to, other)
    seen = [_read(tmp_path, kind, state / "out") for state in [*states, here]]
    assert [each for each in seen if each not in (DOCUMENTS, new, None)] == []
    assert (seen[0], seen[-1]) == (DOCUMENTS, new)
    for state in states:  # the next conversion removes what a killed one left
        convert(*to[:3], state / "out", *to[4:], other)
        assert not list(state.glob("*.partial"))


def _read(folder: Path, kind: str, output: Path) -> list[list[int]] | None:
    """The documents as another project reads them, without a manifest; None if refused."""
    apart = folder / "apart"
    shutil.rmtree(apart, ignore_errors=True)
    shutil.copytree(output.parent, apart)
    manifest_path(apart / "out").unlink(missing_ok=True)
    try:
        options = ["--eod", EOD, "--overwrite"]
        return documents(megatron(folder, kind, apart / "out", options=options))
    except DataError:
        return None


def test_a_full_disk_is_refused_with_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system: without a name

    ours = corpus(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    for kind in KINDS:
        with _refused(str(tmp_path / "out"), "space", "", "free"):
            convert("--from", "megatron", "--to", kind, ours, "--output", tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("size", [1000, 50_001])
def test_a_disk_that_is_full_while_ids_are_written_leaves_nothing(
    tmp_path: Path, size: int
) -> None:
    """Files may then fail to close, too."""
    ours = corpus(tmp_path, [[*np.random.default_rng(0).integers(10, 50_000, 30_000), EOD]])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for kind in KINDS:
        given = ["--eod", EOD] if not KINDS[kind].has_boundaries else []
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with _refused(str(tmp_path / "out"), "large", "", "free"):
                convert("--from", "megatron", "--to", kind, ours, "--output", tmp_path / "out",
                        *given)  # fmt: skip
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.glob("out*")), kind


def test_what_is_not_yet_written_is_no_input(tmp_path: Path) -> None:
    ours = corpus(tmp_path)
    convert("--from", "megatron", "--to", "llmc", ours, "--output", tmp_path / "all" / "a")
    shutil.copytree(tmp_path / "all" / "a", tmp_path / "all" / "b.partial")
    back = megatron(tmp_path, "llmc", tmp_path / "all", options=["--eod", EOD])
    assert documents(back) == DOCUMENTS


def test_a_folder_that_lacks_a_file_by_its_numbers_is_refused(tmp_path: Path) -> None:
    ours, shards, rows = corpus(tmp_path), tmp_path / "shards", tmp_path / "rows"
    to_shards = ("--from", "megatron", "--to", "llmc", ours, "--output", shards)
    convert(*to_shards, "--shard-tokens", 4)
    manifest_path(shards).unlink()
    shutil.copy(shards / "000000.bin", shards / "other_7.bin")  # a number of another sequence
    (shards / "000002.bin").unlink()
    with _refused("000002.bin", "3 of 0 to 3", "no", "copy"):
        megatron(tmp_path, "llmc", shards, options=["--eod", EOD])
    convert("--from", "megatron", "--to", "parquet", ours, "--output", rows / "a-00000-of-00002")
    with _refused("a-00001-of-00002.parquet", "1 of 0 to 1", "no", "*.parquet"):
        megatron(tmp_path, "parquet", rows)
    assert documents(megatron(tmp_path, "parquet", *rows.glob("*.parquet"))) == DOCUMENTS
    (rows / "a-00000-of-00002.parquet").rename(rows / "a-2.parquet")  # does not say how many
    (rows / "a-00000-of-00002.corpus.json").unlink()
    assert documents(megatron(tmp_path, "parquet", rows, options=["--overwrite"])) == DOCUMENTS


def test_an_index_that_is_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    ours = corpus(tmp_path, [[1, EOD]] * 3000)
    index = ours.with_suffix(".idx")
    content = index.read_bytes()
    offset = 34 + 4 * 3000 + 8 * 1501  # not among those that are read when it is opened
    index.write_bytes(content[:offset] + struct.pack("<q", 0) + content[offset + 8 :])
    with _refused("ours.idx", "1501", "offset", "again"):
        megatron(tmp_path, "megatron", ours)
    bounds = 34 + 12 * 3000 + 8 * 1501
    index.write_bytes(content[:bounds] + struct.pack("<q", 1500) + content[bounds + 8 :])
    with _refused("ours.idx", "SHA-256", "expected", ("copy", ".json")):
        megatron(tmp_path, "megatron", ours)
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_conversion_that_ends_while_it_decodes_leaves_no_corpus_and_an_interrupted_one_goes_on(
    error: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> int:
        raise error

    source = tmp_path / "train.bin"
    source.write_bytes(struct.pack("<2H", 65, 256))
    options = ["--eod", 256, "--tokenizer", "bytes"]
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.formats.megatron.count_text_bytes", failing)
        with pytest.raises((DataError, KeyboardInterrupt)):
            megatron(tmp_path, "nanogpt", source, options=options)
    left = {path.name for path in tmp_path.glob("back*")}
    kept = {"back.bin.partial", "back.convert.partial"} if error is KeyboardInterrupt else set()
    assert left == kept
    capsys.readouterr()
    assert documents(megatron(tmp_path, "nanogpt", source, options=options)) == [[65, 256]]
    assert ("4 bytes were written before" in capsys.readouterr().err) == bool(kept)
    expected = {f"back.{suffix}" for suffix in ("bin", "idx", "json")}
    assert {path.name for path in tmp_path.glob("back*")} == expected


def test_a_stream_whose_writer_was_killed_between_batches_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"input_ids": DOCUMENTS, "text": ["a"] * len(DOCUMENTS)})
    with pyarrow.ipc.new_stream(tmp_path / "theirs.arrow", table.schema) as writer:
        writer.write_table(table)
    path = tmp_path / "theirs.arrow"
    path.write_bytes(path.read_bytes()[:-8])  # pyarrow reads it without an error
    with _refused("theirs.arrow", "ffffffff00000000", "end", "replace"):
        megatron(tmp_path, "arrow", path)
    with _refused("theirs.arrow", "ffffffff00000000", "end", "replace"):
        row_groups(path, "arrow", "text")
