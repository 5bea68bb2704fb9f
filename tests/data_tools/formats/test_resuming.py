"""A conversion that was killed anywhere goes on, and its output is that of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.corpus.indexed_writer import IndexedDatasetWriter
from data_tools.errors import DataError
from data_tools.files import conversion_marks
from data_tools.formats import arrow, litdata, mds, raw_files, resuming
from data_tools.formats.blocks import WriteOptions
from data_tools.formats.kinds import KINDS
from tests.data_tools.formats.conversions import EOD, convert, corpus, documents
from tests.refusals import assert_refused

# 12 documents of 40 tokens, in blocks, marks and shards of fewer.
DOCUMENTS = [[*range(10 + i, 49 + i), EOD] for i in range(12)]
SMALL = 300  # bytes
QUICK = {("megatron", "replacing"), ("olmo", "new"), ("mds", "new")}
CASES = [
    pytest.param(
        kind,
        over == "replacing",
        id=f"{kind}-{over}",
        marks=[] if (kind, over) in QUICK else pytest.mark.slow,
    )
    for kind in KINDS
    for over in ("new", "replacing")
]


class _AtOnce:
    """Threads whose work is done when it is given, so that marks are the same each time."""

    def __init__(self, number: int) -> None: ...

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "MARK_BYTES", SMALL)
    monkeypatch.setattr(resuming, "ThreadPoolExecutor", _AtOnce)
    for module, name in (
        (raw_files, "BLOCK_BYTES"),
        (arrow, "BLOCK_BYTES"),
        (arrow, "_GROUP_BYTES"),
        (mds, "_SHARD_BYTES"),
        (litdata, "_CHUNK_BYTES"),
    ):
        monkeypatch.setattr(module, name, SMALL)


def line(kind: str, ours: Path, *options: object) -> list[Any]:
    """The command, whose output is `out` in the current folder."""
    given: list[Any] = ["--from", "megatron", "--to", kind, ours, "--output", "out", *options]
    if not KINDS[kind].has_boundaries:
        given += ["--eod", EOD]
    return [*given, "--shard-tokens", 70] if kind == "llmc" else given


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def killed_before_each_operation(
    command: list[Any], here: Path, states: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Convert in `here`; the folder as it was before each storage operation of the conversion."""
    found: list[Path] = []

    def kept_before(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found.append(shutil.copytree(here, states / str(len(found)), symlinks=True))
            return operation(*arguments, **options)

        return call

    monkeypatch.chdir(here)
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "rename", "unlink"):
            patch.setattr(os, name, kept_before(getattr(os, name)))
        convert(*command)
    yield from found


@pytest.mark.parametrize(("kind", "with_old"), CASES)
def test_killed_anywhere_the_same_command_gives_the_same_files(
    kind: str,
    with_old: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, here = corpus(tmp_path, DOCUMENTS), tmp_path / "here"
    here.mkdir()
    command = line(kind, ours, *(["--overwrite"] if with_old else []))
    old: dict[str, bytes] = {}
    if with_old:
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(here)
        convert(*line(kind, corpus(tmp_path / "other", DOCUMENTS[:3])))
        old = contents(here)
    states = list(killed_before_each_operation(command, here, tmp_path / "states", monkeypatch))
    expected = contents(here)
    assert not [name for name in expected if "partial" in name]
    capsys.readouterr()
    num_kept = 0
    for state in states:
        published = {k: v for k, v in contents(state).items() if "partial" not in k}
        monkeypatch.chdir(state)
        convert(*command)
        num_kept += "were written before" in capsys.readouterr().err
        assert contents(state) == expected, state
        # Before that it is the old output, the new one, or none that has its last file.
        last = {"megatron": "out.idx", "olmo": "out.npy", "datatrove": "out.ds"}.get(kind)
        if last in published and published[last] not in (old.get(last), expected[last]):
            raise AssertionError(f"{state}: {last} is of neither")
    assert num_kept > 0, "otherwise nothing was resumed"


def interrupted_half_way(command: list[Any], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in `here`, interrupted from the keyboard after a mark."""
    sync = resuming.Resumption._sync

    def interrupt(self: resuming.Resumption, opened: Any) -> None:
        sync(self, opened)
        raise KeyboardInterrupt

    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    with monkeypatch.context() as patch:
        patch.setattr(resuming.Resumption, "_sync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(*command)


@pytest.mark.parametrize("kind", ["nanogpt", "megatron", "mds", "parquet"])
def test_of_other_inputs_or_options_it_begins_anew(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = corpus(tmp_path, DOCUMENTS)
    changes = ["nothing", "input", "option", "shorter"]
    changes += ["index"] if KINDS[kind].has_boundaries else []
    for number, change in enumerate(changes):
        here = tmp_path / f"here{number}"
        command = line(kind, ours)
        interrupted_half_way(command, here, monkeypatch)
        left = [path for path in here.rglob("*") if path.is_file()]
        assert here / "out.convert.partial" in left
        if change in ("input", "index"):
            for path in tmp_path.glob("ours.*"):
                path.unlink()
        if change == "input":  # one other id in the first part; as large as before
            corpus(tmp_path, [[3, *DOCUMENTS[0][1:]], *DOCUMENTS[1:]])
        elif change == "option":
            command += ["--vocab-size", 100]
        elif change == "shorter":
            for path in left:
                if path.name != "out.convert.partial":
                    os.truncate(path, 1)
        elif change == "index":  # documents end elsewhere; the ids are the same
            first, second, *others = DOCUMENTS
            corpus(tmp_path, [[*first, *second], *others])
        capsys.readouterr()
        convert(*command)
        assert ("were written before" in capsys.readouterr().err) == (change == "nothing"), change
        fresh = tmp_path / f"fresh{number}"
        fresh.mkdir()
        monkeypatch.chdir(fresh)
        convert(*command)
        assert contents(here) == contents(fresh), change


def test_what_another_conversion_left_is_not_taken_for_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed, then another one of the same output killed, then the first one again."""
    ours, here = corpus(tmp_path, DOCUMENTS), tmp_path / "here"
    (tmp_path / "other").mkdir()
    other = corpus(tmp_path / "other", [[7] * 39 + [EOD]] * 12)
    interrupted_half_way(line("nanogpt", ours), here, monkeypatch)
    state = tmp_path / "states"
    killed = killed_before_each_operation(line("nanogpt", other), here, state, monkeypatch)
    folders = list(killed)
    shutil.rmtree(here)
    here.mkdir()
    monkeypatch.chdir(here)
    convert(*line("nanogpt", ours, "--overwrite"))
    expected = (here / "out.bin").read_bytes()
    for folder in folders:
        monkeypatch.chdir(folder)
        convert(*line("nanogpt", ours, "--overwrite"))
        assert (folder / "out.bin").read_bytes() == expected, folder


def test_a_refused_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.array([5, 9] * 400 + [300], "<u2")  # the last id is refused, after several marks
    (tmp_path / "theirs.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    with pytest.raises(DataError):
        convert("--from", "nanogpt", "--to", "olmo", "theirs.bin", "--output", "out", "--eod", EOD,
                "--vocab-size", 300)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.bin"]


def test_what_another_command_left_in_the_same_files_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a merge that was killed, too."""
    ours, here = corpus(tmp_path, DOCUMENTS), tmp_path / "here"
    interrupted_half_way(line("megatron", ours), here, monkeypatch)
    merging = IndexedDatasetWriter(here / "out", vocab_size=50_000)
    merging.add_document([7] * 1000)
    merging.leave()
    convert(*line("megatron", ours))
    assert "were written before" not in capsys.readouterr().err
    assert documents(here / "out") == DOCUMENTS


def test_a_corpus_that_another_command_wrote_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, here = corpus(tmp_path, DOCUMENTS), tmp_path / "here"
    here.mkdir()
    command = line("megatron", ours)
    states = killed_before_each_operation(command, here, tmp_path / "states", monkeypatch)
    found = []
    for state in states:
        marks = conversion_marks(state / "out")
        is_publishing = marks.exists() and '"publishing": true' in marks.read_text()
        if is_publishing and not any((state / f"out.{s}").exists() for s in ("bin", "idx", "json")):
            found.append(state)
            with IndexedDatasetWriter(state / "out", vocab_size=50_000, with_info=False) as other:
                other.add_document([7, 8])
                other.finish_without_info()
            monkeypatch.chdir(state)
            with assert_refused("out.bin", "exists", (), "--overwrite", error=DataError):
                convert(*command)
            assert documents(state / "out") == [[7, 8]]
    assert found


@pytest.mark.parametrize("marks", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"settings": 1}'])
def test_marks_that_cannot_be_read_begin_anew(
    marks: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = corpus(tmp_path, DOCUMENTS)
    monkeypatch.chdir(tmp_path)
    conversion_marks(Path("out")).write_bytes(marks)
    convert(*line("megatron", ours))
    assert documents(tmp_path / "out") == DOCUMENTS
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["megatron", "olmo"])
def test_interrupted_between_its_names_it_needs_no_overwrite(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing is marked."""
    ours = corpus(tmp_path, DOCUMENTS)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(resuming, "MARK_BYTES", 1 << 20)
    replace = os.replace

    published: list[str] = []

    def interrupt_second(source: Path, target: Path) -> None:
        if "convert" not in target.name:
            if published:
                raise KeyboardInterrupt
            published.append(target.name)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt_second)
        with pytest.raises(KeyboardInterrupt):
            convert(*line(kind, ours))
    assert (here / published[0]).exists()
    convert(*line(kind, ours))
    assert not list(here.glob("*.partial"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "megatron"])
def test_conversions_to_one_output_exclude_each_other_in_any_two_formats(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, here = corpus(tmp_path, DOCUMENTS), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for first, second in (("megatron", kind), (kind, "megatron")):
        writing = KINDS[first].create(Path("out"), np.dtype("<u2"), WriteOptions())
        before = sorted(here.rglob("*"))
        with assert_refused("out", "written", "another process", "wait", error=DataError):
            convert(*line(second, ours))
        assert sorted(here.rglob("*")) == before
        writing.close()
        assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("nanogpt", "out.bin.partial"),
        ("olmo", "out.npy.partial"),
        ("mds", "out.partial"),
        ("llmc", "out.partial/000000.bin"),
    ],
)
def test_what_a_killed_conversion_left_is_no_input(
    kind: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_half_way(line(kind, corpus(tmp_path, DOCUMENTS)), tmp_path / "here", monkeypatch)
    assert Path(left).exists()
    partial_name = next(name for name in left.split("/") if name.endswith(".partial"))
    with assert_refused(left, partial_name, "whole corpus", ("again", "rename"), error=DataError):
        convert("--from", kind, "--to", "megatron", left, "--output", "new", "--eod", EOD)
