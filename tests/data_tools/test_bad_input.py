"""Input and surroundings that break other preprocessors: each is counted or refused by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_tools.corpus.indexed import HEADER, MAGIC, IndexedDataset
from data_tools.errors import DataError
from data_tools.preprocess import main
from data_tools.verify import verify
from tests.data_tools.tokenization.tokenizer_folders import byte_level, declare
from tests.missing import cannot_run
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def _preprocess(source: Path, output: Path, *options: str) -> IndexedDataset:
    required = ["--input", str(source), "--output", str(output), "--tokenizer", "bytes"]
    main([*required, "--workers", "1", *options])
    return IndexedDataset(output)


def _program_that_prints_its_peak(arguments: list[str]) -> str:
    return f"""
import re
from data_tools.preprocess import main
main({arguments!r})
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_line_of_200_megabytes_is_left_out_in_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "in.jsonl", "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "behind"}\n')
    output = tmp_path / "out"
    limit = ["--max-document-megabytes", "16"]
    with _refused(
        "in.jsonl:2", value=16, constraint="MiB", remedy=("split", "--max-document-megabytes")
    ):
        _preprocess(tmp_path / "in.jsonl", output, *limit)
    arguments = f"--input {tmp_path}/in.jsonl --output {output} --tokenizer bytes --workers 1"
    program = _program_that_prints_its_peak([*arguments.split(), "--on-bad-line", "skip", *limit])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200 * 1024
    dataset = IndexedDataset(output)
    assert [bytes(dataset.document(i)[:-1].tolist()) for i in (0, 1)] == [b"before", b"behind"]
    assert dataset.info is not None
    assert dataset.info.sources[0].left_out == {"larger than 16 MiB": 1}
    [left_out] = (tmp_path / "out.left_out.jsonl").read_text().splitlines()
    assert json.loads(left_out)["line"] == 2


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json"])
def test_document_of_any_length_is_tokenized_where_there_is_memory(
    tmp_path: Path, tokenizer: str, name: str
) -> None:
    """Bytes need little; for other tokenizers, who raises the limit says that there is enough."""
    size = (17 << 20) if tokenizer == "bytes" else (1 << 20) + 1
    options = ["--overwrite", "--tokenizer", tokenizer]
    if tokenizer != "bytes":
        options[-1] = str(byte_level(tmp_path, ["</s>"]))
    content = json.dumps({"text": "x" * size}) if name == "in.jsonl" else "x" * size
    (tmp_path / name).write_text(content)
    if tokenizer != "bytes":
        small = [*options, "--max-document-megabytes", "1"]
        with _refused(
            name, value=1, constraint="MiB", remedy=("split", "--max-document-megabytes")
        ):
            _preprocess(tmp_path / name, tmp_path / "out", *small)
    dataset = _preprocess(tmp_path / name, tmp_path / "out", *options)
    assert dataset.info is not None
    assert dataset.info.num_bytes == size


def test_null_bytes_are_text_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "c"}\n')
    dataset = _preprocess(tmp_path / "in.jsonl", tmp_path / "out")
    assert dataset.document(0).tolist() == [97, 0, 98, 256]
    assert dataset.info is not None
    assert dataset.info.sources[0].num_with_null_bytes == 1


def test_line_of_a_bad_document_is_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    """Also in a shard that begins in the middle of the file."""
    lines = [json.dumps({"text": "x" * 1000})] * 5000
    lines[3999] = '{"text": 5}'
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with _refused(
        "in.jsonl:4000", value="'text'", constraint="int", remedy=("--json-key", "--on-bad-line")
    ):
        _preprocess(tmp_path / "in.jsonl", tmp_path / "out", "--shard-megabytes", "1")
    skip = ["--shard-megabytes", "1", "--on-bad-line", "skip"]
    _preprocess(tmp_path / "in.jsonl", tmp_path / "skipped", *skip)
    [left_out] = (tmp_path / "skipped.left_out.jsonl").read_text().splitlines()
    assert json.loads(left_out)["line"] == 4000


def test_corrupt_files_publish_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08 and no more")
    (tmp_path / "b.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd and no more")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 999}), tmp_path / "c.parquet")
    content = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(content[:-100])
    for name in ("a.jsonl.gz", "b.txt.zst", "c.parquet"):
        with _refused(name, value="end", constraint="read", remedy="replace"):
            _preprocess(tmp_path / name, tmp_path / "out", "--on-bad-line", "skip")
        assert not list(tmp_path.glob("out*"))


def test_ids_that_occur_must_fit_the_vocabulary_of_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("text")
    with _refused("--vocab-size", value=256, constraint=("id 256", "257"), remedy="raise"):
        _preprocess(tmp_path / "in.txt", tmp_path / "out", "--vocab-size", "256")
    _preprocess(tmp_path / "in.txt", tmp_path / "out", "--vocab-size", "257")
    # A token beyond the model, as [PAD] often is, does no harm as long as no text spells it.
    byte_level(tmp_path / "t", ["</s>"])
    declare(tmp_path / "t", tokenizer_config={"eos_token": "</s>", "pad_token": "[PAD]"})
    options = ["--tokenizer", str(tmp_path / "t"), "--vocab-size", "301", "--overwrite"]
    dataset = _preprocess(tmp_path / "in.txt", tmp_path / "out", *options)
    assert dataset.document(0)[-1] == 300
    assert "has ids up to 301; a document with an id of 301 or more" in capsys.readouterr().err
    (tmp_path / "in.txt").write_text("text [PAD]")
    constraint = ("[PAD]", "--vocab-size is 301")
    with _refused("in.txt", value=301, constraint=constraint, remedy="raise"):
        _preprocess(tmp_path / "in.txt", tmp_path / "out", *options)
    _preprocess(tmp_path / "in.txt", tmp_path / "out", *options, "--special-tokens", "plain")


def test_vocabulary_with_holes_gets_a_dtype_for_its_largest_id(tmp_path: Path) -> None:
    """A vocabulary of three tokens, one of them 70,000: counting tokens would give uint8."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "</s>": 2}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("a b a")
    options = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    dataset = _preprocess(tmp_path / "in.txt", tmp_path / "out", *options)
    assert dataset.document(0).tolist() == [0, 70_000, 0, 2]
    verify(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("workers", "megabytes", "message"),
    [
        (
            "1",
            "3",
            r"cannot write shard .*No space left on device.*free space.*finished and kept",
        ),
        # Of two shards at a time none may be finished when the disk is full.
        ("2", "3", r"cannot write shard .*No space left on device.*free space"),
        ("1", "20", r"out: cannot be written .No space left on device.; free as much .*same comma"),
    ],
)
def test_full_disk_is_one_line_and_leaves_no_output(
    tmp_path: Path, workers: str, megabytes: str, message: str
) -> None:
    """A real file system, too small for the shards or for joining them, in its own namespace."""
    if shutil.which("unshare") is None or _in_namespace("true").returncode != 0:
        cannot_run("no user and mount namespaces here", needs="unshare")
    text = "".join(json.dumps({"text": "x" * 1000}) + "\n" for _ in range(6000))
    (tmp_path / "in.jsonl").write_text(text)
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"--tokenizer bytes --workers {workers} --shard-megabytes 1"
    command = (
        f"mount -t tmpfs -o size={megabytes}m none {disk} && {sys.executable} "
        f"-m data_tools.preprocess --input {tmp_path}/in.jsonl --output {disk}/out {options}; "
        f"status=$?; ls {disk}; exit $status"
    )
    done = _in_namespace(command)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert re.search(message, line), line
    is_kept = workers == "1" or "finished and kept" in line
    assert done.stdout.split() == ["out.work"] * is_kept


def _in_namespace(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True,
        text=True,
    )


def test_index_of_another_corpus_is_refused(tmp_path: Path) -> None:
    for name, text in (("a", "one text"), ("b", "quite another text")):
        (tmp_path / f"{name}.txt").write_text(text)
        _preprocess(tmp_path / f"{name}.txt", tmp_path / name)
    (tmp_path / "b.idx").replace(tmp_path / "a.idx")
    with _refused("a.bin", value=18, constraint=("38", "a.idx"), remedy="preprocess"):
        IndexedDataset(tmp_path / "a")


def _write_sparse(prefix: Path, lengths: list[int]) -> None:
    """Documents of zeros as uint16 that take no room on the disk."""
    count, sizes = len(lengths), 2 * np.array(lengths, dtype="<i8")
    with open(prefix.with_suffix(".bin"), "wb") as file:
        file.truncate(int(sizes.sum()))
    with open(prefix.with_suffix(".idx"), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        file.write(np.array(lengths, dtype="<i4"))
        file.write(np.cumsum(sizes) - sizes)
        file.write(np.arange(count + 1, dtype="<i8"))


def test_offsets_beyond_32_bits_are_read(tmp_path: Path) -> None:
    """3 billion tokens in 6 GB: tokens, bytes and offsets all pass 2**31."""
    lengths = [2**31 - 1, 5, 900_000_000, 7]
    _write_sparse(tmp_path / "c", lengths)
    dataset = IndexedDataset(tmp_path / "c")
    assert dataset.num_tokens == sum(lengths) > 2**31
    assert [len(dataset.document(i)) for i in range(4)] == lengths
    assert np.diff(dataset.document_ends(0, 4), prepend=0).tolist() == lengths


@pytest.mark.slow
def test_more_than_32_bits_of_tokens_are_written_and_verified(tmp_path: Path) -> None:
    """2.2 billion tokens go through `merge` and `verify`: about 5 GB are written."""
    for name in ("a", "b"):
        _write_sparse(tmp_path / name, [100_000_000] * 11)
    from data_tools.corpus.indexed_writer import IndexedDatasetWriter, append_corpora

    datasets = [IndexedDataset(tmp_path / name) for name in ("a", "b")]
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=60_000) as writer:
        append_corpora(writer, datasets, lambda *_: None)
        writer.finish(
            tokenizer="t", tokenizer_fingerprint="f", eod_id=None, num_bytes=1, command=""
        )
    assert IndexedDataset(tmp_path / "c").num_tokens == 2_200_000_000
    assert "checksums equal" in verify(str(tmp_path / "c"))
