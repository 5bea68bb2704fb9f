"""Corpora of other projects that are read where they are, through an index beside them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter
from data_tools.errors import DataError
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
SUFFIXES = {"nanogpt": ".bin", "olmo": ".npy", "datatrove": ".ds"}


def _theirs(folder: Path, kind: str, *, vocab_size: int = 50_000, recorded: bool = False) -> Path:
    """The one file of ids of a corpus of another project."""
    ours = corpus(folder, vocab_size=vocab_size)
    convert("--from", "megatron", "--to", kind, ours, "--output", folder / "theirs")
    if not recorded:
        forget(folder / "theirs")
    return folder / f"theirs{SUFFIXES[kind]}"


def _token(kind: str) -> list[object]:
    return ["--eod", EOD] if kind == "nanogpt" else []


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", SUFFIXES)
def test_the_corpus_is_that_of_a_copy_and_its_ids_are_the_input(
    kind: str, recorded: bool, tmp_path: Path
) -> None:
    source = _theirs(tmp_path, kind, recorded=recorded)
    options = [] if recorded else _token(kind)
    copied = megatron(tmp_path, kind, source, options=options)
    output = tmp_path / "linked"
    convert("--from", kind, "--to", "megatron", source, "--in-place", "--output", output, *options)
    assert documents(output) == DOCUMENTS
    assert_same_files(output, copied)
    assert Path(f"{output}.bin").is_symlink()
    assert os.path.samefile(f"{output}.bin", source)
    assert Path(f"{output}.json").exists() == recorded
    if recorded:
        verify(str(output))
    assert sorted(path.name for path in tmp_path.glob("linked*")) == sorted(
        f"linked{suffix}" for suffix in (".bin", ".idx", *([".json"] if recorded else []))
    )


@pytest.mark.parametrize("kind", ["olmo", "datatrove"])
def test_ids_of_four_bytes_are_read_as_int32(kind: str, tmp_path: Path) -> None:
    source = _theirs(tmp_path, kind, vocab_size=100_000)
    assert source.stat().st_size == 4 * sum(map(len, DOCUMENTS))
    output = tmp_path / "linked"
    convert("--from", kind, "--to", "megatron", source, "--in-place", "--output", output)
    assert documents(output) == DOCUMENTS
    assert IndexedDataset(output).dtype == np.dtype("<i4")


def test_another_conversion_replaces_the_link_and_not_the_input(tmp_path: Path) -> None:
    source = _theirs(tmp_path, "datatrove")
    before, output = source.read_bytes(), tmp_path / "linked"
    common = ("--from", "datatrove", "--to", "megatron", source, "--output", output)
    convert(*common, "--in-place")
    convert(*common, "--in-place", "--overwrite")
    assert Path(f"{output}.bin").is_symlink()
    convert(*common, "--overwrite")
    assert not Path(f"{output}.bin").is_symlink()
    assert Path(f"{output}.bin").read_bytes() == source.read_bytes() == before


def test_an_input_that_is_cut_afterwards_is_refused(tmp_path: Path) -> None:
    source = _theirs(tmp_path, "datatrove")
    output = tmp_path / "linked"
    convert("--from", "datatrove", "--to", "megatron", source, "--in-place", "--output", output)
    source.write_bytes(source.read_bytes()[:-2])
    with _refused("linked.bin", value=source.stat().st_size, constraint="expected", remedy="again"):
        IndexedDataset(output)


def test_a_link_to_nothing_says_what_is_gone_and_is_not_replaced(tmp_path: Path) -> None:
    source = _theirs(tmp_path, "nanogpt")
    output = tmp_path / "linked"
    common = ("--from", "nanogpt", "--to", "megatron", "--in-place", "--output", output)
    convert(*common, source, "--eod", EOD)
    moved = source.rename(tmp_path / "moved.bin")
    with _refused("linked.bin", value=source, constraint="expected", remedy=("back", "link")):
        IndexedDataset(output)
    Path(f"{output}.idx").unlink()
    with _refused("linked.bin", value="exists", constraint=(), remedy="--overwrite"):
        convert(*common, moved, "--eod", EOD)


def test_an_input_that_grows_is_refused_and_the_corpus_before_it_stays(tmp_path: Path) -> None:
    source = _theirs(tmp_path, "nanogpt")
    output = tmp_path / "ours"
    with IndexedDatasetWriter(
        output, vocab_size=2**16, overwrite=True, with_info=False, stored_in=source
    ) as writer:
        writer.add_documents(np.array([1, EOD], "<u2"), np.array([2]))
        with _refused(str(source), value=28, constraint="4 expected", remedy="with a copy"):
            writer.finish_without_info()
    assert documents(output) == DOCUMENTS
    assert {path.name for path in tmp_path.iterdir()} == {
        source.name,
        *(f"ours{suffix}" for suffix in (".bin", ".idx", ".json")),
    }


def test_a_link_that_a_killed_conversion_left_goes_with_the_next(tmp_path: Path) -> None:
    source = _theirs(tmp_path, "nanogpt")
    (tmp_path / "copied.bin.link").symlink_to(source)
    output = tmp_path / "copied"
    common = ("--from", "nanogpt", "--to", "megatron", source, "--output", output)
    convert(*common, "--eod", EOD)
    assert {path.name for path in tmp_path.glob("copied*")} == {"copied.bin", "copied.idx"}


@pytest.mark.parametrize("in_place", [[], ["--in-place"]])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json", ".corpus.json"])
def test_an_input_under_a_name_of_the_output_is_refused(
    suffix: str, in_place: list[str], tmp_path: Path
) -> None:
    source = _theirs(tmp_path, "nanogpt").rename(tmp_path / f"out{suffix}")
    before = source.read_bytes()
    with _refused(str(source), value="input", constraint="replace", remedy="--output"):
        convert(
            *("--from", "nanogpt", "--to", "megatron", source, *in_place, "--eod", EOD),
            *("--overwrite", "--output", tmp_path / "out"),
        )
    assert source.read_bytes() == before


def test_what_is_no_bin_of_one_corpus_is_refused(tmp_path: Path) -> None:
    source = _theirs(tmp_path, "nanogpt")
    output = tmp_path / "linked"
    last = ("--in-place", "--output", output, "--eod", EOD)
    with _refused("--in-place", value="llmc", constraint="nanogpt, olmo", remedy="remove"):
        convert("--from", "nanogpt", "--to", "llmc", source, *last)
    (tmp_path / "more.bin").write_bytes(source.read_bytes())
    with _refused("--in-place", value=2, constraint="one expected", remedy="data.train"):
        convert("--from", "nanogpt", "--to", "megatron", source, tmp_path / "more.bin", *last)
    assert not list(tmp_path.glob("linked*"))


def test_an_id_that_the_index_cannot_say_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    np.array([1, 2**31 + 5, EOD], "<u4").tofile(path)
    output = tmp_path / "linked"
    with _refused("big.bin", value=2**31 + 5, constraint="int32", remedy=()):
        convert(
            *("--from", "nanogpt", "--to", "megatron", path, "--dtype", "uint32"),
            *("--in-place", "--output", output, "--eod", EOD),
        )
    assert not list(tmp_path.glob("linked*"))
