"""`preprocess` killed at any moment and started again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.files import open_partial
from data_tools.preprocess import main
from data_tools.verify import verify
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_SUFFIXES = (".bin", ".idx", ".json", ".left_out.jsonl")


def _write_input(path: Path, *, with_bad_lines: bool) -> Path:
    """About 6 MB."""
    generator = random.Random(0)
    with open(path, "w") as file:
        for i in range(40_000):
            text = "" if i % 97 == 0 else f"document {i} " * generator.randint(1, 20)
            is_bad = with_bad_lines and i % 89 == 0
            file.write("bad\n" if is_bad else json.dumps({"text": text}) + "\n")
    return path


def _arguments(source: Path, output: Path | str) -> list[str]:
    skip = ["--on-bad-line", "skip"]
    options = ["--tokenizer", "bytes", *skip, "--shard-megabytes", "1", "--workers", "2"]
    return ["--input", str(source), "--output", str(output), *options]


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def _run_with_kills(source: Path, folder: Path, num_kills: int, seed: int) -> None:
    """Kill the command at random moments until it has been killed so often, then let it end."""
    folder.mkdir()
    command = [sys.executable, "-m", "data_tools.preprocess", *_arguments(source, "out")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    generator, kills, longest = random.Random(seed), 0, 2.0
    while True:
        begin = time.monotonic()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            wait = generator.uniform(0, longest) if kills < num_kills else None
            _, errors = process.communicate(timeout=wait)
            assert process.returncode == 0, errors
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            _assert_nothing_half(folder)
            if not _has_ended(folder):
                kills += 1
                continue
        if kills >= num_kills:
            return
        # It was faster than the kill: begin anew, and kill earlier.
        longest = (time.monotonic() - begin) * 0.9
        shutil.rmtree(folder)
        folder.mkdir()


def _has_ended(folder: Path) -> bool:
    """Whether the output is there and nothing is left to do: the kill met the process's exit."""
    markers = (folder / "out.work" / name for name in ("publishing", "published"))
    return (folder / "out.idx").exists() and not any(marker.exists() for marker in markers)


def _assert_nothing_half(folder: Path) -> None:
    if (folder / "out.idx").exists():
        verify(str(folder / "out"))
    else:
        with _refused("out.idx", value="no such file", constraint="no", remedy="path"):
            IndexedDataset(folder / "out")


def _compare_with_undisturbed(tmp_path: Path, *, num_kills: int, seed: int) -> None:
    source = _write_input(tmp_path / "in.jsonl", with_bad_lines=True)
    _run_with_kills(source, tmp_path / "killed", num_kills, seed)
    _run_with_kills(source, tmp_path / "undisturbed", 0, seed)
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "undisturbed")
    assert list(_contents(tmp_path / "killed")) == sorted("out" + suffix for suffix in _SUFFIXES)


def test_killed_and_resumed_runs_write_the_output_of_an_undisturbed_one(tmp_path: Path) -> None:
    _compare_with_undisturbed(tmp_path, num_kills=4, seed=0)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    _compare_with_undisturbed(tmp_path, num_kills=20, seed=1)


@pytest.fixture
def stopped(tmp_path: Path) -> list[str]:
    """Arguments of a run that stopped at a bad line, after shards of a good file were finished."""
    good = _write_input(tmp_path / "good.jsonl", with_bad_lines=False)
    (tmp_path / "late.jsonl").write_text('{"text": "late"}\nbad\n')
    arguments = [*_arguments(good, tmp_path / "out"), "--workers", "1"]
    arguments[2:2] = [str(tmp_path / "late.jsonl")]
    with _refused(
        "late.jsonl:2",
        value="JSON",
        constraint="valid",
        remedy=("--on-bad-line", "6 of 7 shards", "out.work"),
    ):
        main([*arguments, "--on-bad-line", "error"])
    return arguments


def test_finished_shards_are_not_encoded_again(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (tmp_path / "out.idx").exists()
    main(stopped)
    assert "6 of 7 shards were finished before" in capsys.readouterr().out
    assert not (tmp_path / "out.work").exists()


def test_shards_of_a_changed_file_are_encoded_again(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "another"}\n')
    main(stopped)
    assert "finished before" not in capsys.readouterr().out
    assert IndexedDataset(tmp_path / "out").num_documents == 2


def test_shards_of_other_settings_are_refused(stopped: list[str]) -> None:
    with _refused("out.work", value=256, constraint=("eod_id", "None"), remedy="original command"):
        main([*stopped, "--no-append-eod"])
    main(stopped)


def test_partly_published_output_is_completed_by_the_next_run(
    stopped: list[str], tmp_path: Path
) -> None:
    """Killed after .bin got its name and before .idx did."""
    (tmp_path / "out.bin").write_bytes(b"half")
    with _refused("out.bin", value="exists", constraint="exists", remedy=("output", "--overwrite")):
        main(stopped)
    (tmp_path / "out.work" / "publishing").touch()
    main(stopped)
    verify(str(tmp_path / "out"))


def test_complete_output_with_a_leftover_work_folder_is_kept(
    stopped: list[str], tmp_path: Path
) -> None:
    """Killed while the work folder was being removed."""
    work, kept = tmp_path / "out.work", tmp_path / "kept"
    shutil.copytree(work, kept)
    (kept / "publishing").touch()
    main(stopped)
    assert not work.exists()
    kept.rename(work)
    (work / "published").write_bytes(b"another plan")
    with _refused("out.bin", value="exists", constraint="exists", remedy=("output", "--overwrite")):
        main(stopped)
    assert not work.exists()
    verify(str(tmp_path / "out"))


def test_mistyped_input_keeps_finished_shards(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mistyped.jsonl").write_text("bad\n")
    rest = stopped[stopped.index("--output") :]
    mistyped = ["--input", str(tmp_path / "mistyped.jsonl"), *rest, "--on-bad-line", "error"]
    with pytest.raises(DataError, match=r"mistyped.jsonl:1"):
        main(mistyped)
    main(stopped)
    assert "6 of 7 shards were finished before" in capsys.readouterr().out


def test_two_runs_of_one_output_do_not_mix(stopped: list[str], tmp_path: Path) -> None:
    with (
        open_partial(tmp_path / "out.work" / "lock"),
        _refused("lock.partial", value="process", constraint="written", remedy=("wait", "output")),
    ):
        main(stopped)
    main(stopped)
