from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_tools import train_tokenizer
from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.preprocess import _resume_settings, main
from data_tools.preprocessing.encoding import EncodingSettings
from data_tools.preprocessing.resume_folder import ResumeFolder
from data_tools.verify import verify
from tests.data_tools.tokenization.tokenizer_folders import byte_level, declare
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_TEXTS = [f"document number {i} " + "word " * (i % 50) + "\u00e9\n" for i in range(3000)]


def _write_jsonl(path: Path, texts: Sequence[str] = _TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _preprocess(source: Path, output: Path, *options: str) -> IndexedDataset:
    required = ["--input", str(source), "--output", str(output), "--tokenizer", "bytes"]
    main([*required, "--workers", "1", *options])
    return IndexedDataset(output)


def test_corpus_holds_every_text_and_an_end_token(tmp_path: Path) -> None:
    dataset = _preprocess(_write_jsonl(tmp_path / "in.jsonl"), tmp_path / "out")
    verify(str(tmp_path / "out"))
    assert dataset.num_documents == len(_TEXTS)
    for index in (0, 1, 1500, 2999):
        assert dataset.document(index).tolist() == [*_TEXTS[index].encode(), 256]
    assert dataset.info is not None
    assert dataset.info.num_bytes == sum(len(text.encode()) for text in _TEXTS)
    assert dataset.info.num_tokens == dataset.info.num_bytes + len(_TEXTS)
    assert (dataset.info.tokenizer_fingerprint, dataset.info.eod_id) == ("bytes", 256)
    assert dataset.info.command.startswith("python -m data_tools.preprocess --input ")


@pytest.mark.parametrize("command", ["preprocess", "train_tokenizer"])
def test_files_of_a_folder_that_are_not_read_are_counted_by_suffix(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.md", "b.md", "Makefile", "c.txt", "d.jsonl"):
        (folder / name).write_text('{"text": "some text"}\n' * 200)
    if command == "preprocess":
        _preprocess(folder, tmp_path / "out")
    else:
        output = ["--output", str(tmp_path / "t.model"), "--vocab-size", "280"]
        train_tokenizer.main(["--input", str(folder), *output])
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {folder}: 3 of 5 files are not read")
    assert "2 .md, 1 Makefile" in warning
    assert warning.count("\n") == 1
    (folder / "a.md").unlink()
    (folder / "b.md").unlink()
    (folder / "Makefile").unlink()
    _preprocess(folder, tmp_path / "again")
    assert capsys.readouterr().err == ""


def test_output_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = _write_jsonl(tmp_path / "in.jsonl")
    _preprocess(source, tmp_path / "one")
    _preprocess(source, tmp_path / "two", "--workers", "2")
    for suffix in (".bin", ".idx"):
        contents = [(tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two")]
        assert contents[0] == contents[1]


def test_text_files_are_one_document_each_and_empty_ones_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (("b.txt", "second"), ("a.txt", "first\nline"), ("c.txt", "")):
        (folder / name).write_text(text)
    dataset = _preprocess(folder, tmp_path / "out", "--no-append-eod")
    assert [bytes(dataset.document(i).tolist()) for i in range(2)] == [b"first\nline", b"second"]
    assert dataset.num_documents == 2
    assert dataset.info is not None
    assert dataset.info.eod_id is None
    assert "1 left out: empty" in capsys.readouterr().out


def test_another_json_key_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"content": "x", "text": "y"}\n')
    dataset = _preprocess(tmp_path / "in.jsonl", tmp_path / "out", "--json-key", "content")
    assert dataset.document(0).tolist() == [ord("x"), 256]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_line_stops_with_its_location_and_leaves_nothing(tmp_path: Path, workers: str) -> None:
    source = _write_jsonl(tmp_path / "in.jsonl")
    with open(source, "a") as file:
        file.write('{"text": "unfinished\n')
    with _refused("in.jsonl:3001", value="JSON", constraint="valid", remedy="--on-bad-line skip"):
        _preprocess(source, tmp_path / "out", "--workers", workers)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_bad_lines_can_be_skipped_and_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [b'{"text": "good"}', b"bad", b'{"text": "\xff"}', b'{"text": "too"}'] + [b"[]"] * 20
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    dataset = _preprocess(tmp_path / "in.jsonl", tmp_path / "out", "--on-bad-line", "skip")
    assert dataset.num_documents == 2
    shown = capsys.readouterr()
    assert "1 left out: not valid JSON, 1 left out: not UTF-8, 20 left out: no text" in shown.out
    errors = shown.err.splitlines()
    assert errors[0].startswith(f"left out: {tmp_path}/in.jsonl:2: not valid JSON")
    assert errors[-1] == f"left out: all of them are in {tmp_path}/out.left_out.jsonl"
    listed = (tmp_path / "out.left_out.jsonl").read_text().splitlines()
    assert [json.loads(entry)["line"] for entry in listed] == [2, 3, *range(5, 25)]


def test_existing_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    first = _write_jsonl(tmp_path / "first.jsonl", ["first"])
    second = _write_jsonl(tmp_path / "second.jsonl", ["second"])
    _preprocess(first, tmp_path / "out")
    with _refused("out.bin", value="exists", constraint="exists", remedy=("output", "--overwrite")):
        _preprocess(second, tmp_path / "out")
    assert IndexedDataset(tmp_path / "out").num_tokens == 6
    assert _preprocess(second, tmp_path / "out", "--overwrite").num_tokens == 7


@pytest.mark.parametrize("text", [None, "", "\n"])
def test_input_without_text_is_refused(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "in.jsonl").write_text(text if text == "\n" else "" if text is None else "{}")
    if text == "":
        (tmp_path / "in.jsonl").write_text('{"text": ""}\n')
    with _refused(str(tmp_path / "out"), value="documents", constraint="text", remedy="text"):
        _preprocess(tmp_path / "in.jsonl", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--workers", "0"], ("--workers", 0, "1", "raise")),
        (["--eod", "x", "--no-append-eod"], ("--eod", "x", "--no-append-eod", "remove")),
        (["--input", "/no/such/*.jsonl"], ("/no/such/*.jsonl", "no such file", "nothing", "path")),
    ],
)
def test_option_that_cannot_be_used_is_refused(
    tmp_path: Path, options: list[str], parts: tuple
) -> None:
    source = _write_jsonl(tmp_path / "in.jsonl", ["x"])
    with assert_refused(*parts, error=DataError):
        _preprocess(source, tmp_path / "out", *options)


def _preprocess_with(
    folder: Path, texts: Sequence[str], *options: str, tokenizer: Path | None = None
) -> IndexedDataset:
    source = _write_jsonl(folder / "in.jsonl", texts)
    spec = str(tokenizer or folder / "t")
    return _preprocess(source, folder / "out", "--overwrite", "--tokenizer", spec, *options)


def _documents(dataset: IndexedDataset) -> list[list[int]]:
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


_CHAT = ["<|im_start|>user\nriver stone<|im_end|>\n", "water"]


def test_documents_are_what_transformers_makes_of_them_and_an_end_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    byte_level(tmp_path / "t", special, begin="<|begin|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    declare(tmp_path / "t", tokenizer_config={**config, "bos_token": "<|begin|>"})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    dataset = _preprocess_with(tmp_path, _CHAT)
    expected = [[*theirs(text).input_ids, theirs.eos_token_id] for text in _CHAT]
    assert _documents(dataset) == expected
    assert dataset.info is not None
    assert dataset.info.text_rules == (301, (300,), "parse")
    assert (
        "begin with <|begin|> (300; from its post-processor) and end with <|end|> (301; decla"
        in (capsys.readouterr().out)
    )
    dataset = _preprocess_with(tmp_path, _CHAT, "--no-add-bos", "--special-tokens", "plain")
    assert _documents(dataset) == [
        [*theirs.encode(t, add_special_tokens=False, split_special_tokens=True), 301] for t in _CHAT
    ]
    assert dataset.info is not None
    assert dataset.info.text_rules == (301, (), "plain")
    verify(str(tmp_path / "out"))


def test_begin_token_can_be_asked_for_where_one_is_declared(tmp_path: Path) -> None:
    byte_level(tmp_path / "t", ["<s>", "</s>"])
    with _refused("--add-bos", value="token", constraint="begins", remedy="remove --add-bos"):
        _preprocess_with(tmp_path, _CHAT, "--add-bos")
    other = declare(
        byte_level(tmp_path / "u", ["<s>", "</s>"]), tokenizer_config={"bos_token": "<s>"}
    )
    with_bos = _preprocess_with(tmp_path, ["a"], "--add-bos", tokenizer=other)
    assert _documents(with_bos)[0][0] == 300
    assert _documents(_preprocess_with(tmp_path, ["a"], tokenizer=other))[0][0] != 300
    source = _write_jsonl(tmp_path / "in.jsonl", ["a"])
    with _refused("--add-bos", value="token", constraint="begins", remedy="remove --add-bos"):
        _preprocess(source, tmp_path / "bytes", "--add-bos")
    with _refused("--special-tokens", value="parse", constraint="`bytes`", remedy="remove"):
        _preprocess(source, tmp_path / "bytes", "--special-tokens", "parse")


def test_tokenizer_without_an_end_token_works_where_none_is_wanted(tmp_path: Path) -> None:
    byte_level(tmp_path / "t")
    with _refused(
        "tokenizer.json",
        value="</s>",
        constraint="[EOS]",
        remedy=("--eod TOKEN", "--no-append-eod"),
    ):
        _preprocess_with(tmp_path, ["river"])
    dataset = _preprocess_with(tmp_path, ["river stone", "river"], "--no-append-eod")
    tokenizer = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    assert _documents(dataset) == [tokenizer.encode(t).ids for t in ("river stone", "river")]
    assert dataset.info is not None
    assert dataset.info.eod_id is None


def test_end_token_that_is_asked_for_replaces_the_declared_one(tmp_path: Path) -> None:
    byte_level(tmp_path / "t", ["<|endoftext|>", "<|doc|>"])
    declare(tmp_path / "t", tokenizer_config={"eos_token": "<|endoftext|>"})
    dataset = _preprocess_with(tmp_path, ["river"], "--eod", "<|doc|>")
    assert _documents(dataset)[0][-1] == 301
    assert dataset.info is not None
    assert dataset.info.eod_id == 301


def test_unfinished_shards_of_other_settings_are_not_resumed(tmp_path: Path) -> None:
    byte_level(tmp_path / "t", ["<|endoftext|>"])
    folder = ResumeFolder(tmp_path / "out")
    source = _write_jsonl(tmp_path / "in.jsonl", ["river"])
    settings = EncodingSettings(str(tmp_path / "t"), None, True, "text", skip_bad_lines=False)
    folder.plan(_resume_settings(settings), [])
    folder.claim(overwrite=False)
    (folder.path / "kept.report").write_text("{}")
    folder.release()
    constraint = ("special_tokens", "plain")
    with _refused("out.work", value="parse", constraint=constraint, remedy="original command"):
        _preprocess(
            source,
            tmp_path / "out",
            "--tokenizer",
            str(tmp_path / "t"),
            "--special-tokens",
            "plain",
        )


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """64 MB of text, of which a process that kept it as ids would hold 512 MB."""
    line = json.dumps({"text": "x" * 8000}).encode() + b"\n"
    with open(tmp_path / "in.jsonl", "wb") as file:
        for _ in range(8000):
            file.write(line)
    program = f"""
import re
from data_tools.preprocess import main
from data_tools.verify import verify
main(["--input", {str(tmp_path / "in.jsonl")!r}, "--output", {str(tmp_path / "out")!r},
      "--tokenizer", "bytes", "--workers", "1"])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200 * 1024
    tokens = IndexedDataset(tmp_path / "out").tokens
    assert np.count_nonzero(tokens == 256) == 8000


def test_command_line_reports_an_error_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    options = f"--input /no/such/file.jsonl --output {tmp_path}/out --tokenizer bytes".split()
    command = [sys.executable, "-m", "data_tools.preprocess", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: /no/such/file.jsonl: no such file, or nothing in it; check the path\n"
    )


@pytest.mark.parametrize(
    "module",
    ["preprocess", "train_tokenizer", "inspect_corpus", "demo_corpus", "merge", "split", "verify"],
)
def test_help_shows_an_example(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"data_tools.{module}", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert f"example:\n  python -m data_tools.{module} " in done.stdout
