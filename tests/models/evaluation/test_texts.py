"""Texts begin, are preceded and end as in training, or as the tokenizer's files say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from models import evaluate
from models.checkpoint import open_checkpoint
from models.evaluation.texts import Texts, load_texts
from models.hf.declared import Declared, write_declared
from parallel.checkpoint.manifest import UNKNOWN_TEXT, TextRecord
from tests.data_tools.tokenization.tokenizer_folders import byte_level, declare
from tests.models.checkpoints import config, write_checkpoint
from tests.refusals import assert_refused, error_line

BEGIN, END = 300, 301


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder, ["<|begin|>", "<|end|>"], begin="<|begin|>")
    named = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return str(
        declare(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **named})
    )


def _texts(
    folder: Path, spec: str | None, text: TextRecord = UNKNOWN_TEXT, size: int = 302, **given: Any
) -> Texts:
    checkpoint = folder / "step_0"
    if not (checkpoint / "weights").exists():
        write_checkpoint(checkpoint, config())
    stored = open_checkpoint(checkpoint)
    return load_texts(
        stored._replace(config=config(vocab_size=size), tokenizer=spec, text=text), **given
    )


@pytest.mark.parametrize(
    ("text", "given", "begins", "prefix", "arguments"),
    [
        (UNKNOWN_TEXT, {}, True, BEGIN, ""),
        (UNKNOWN_TEXT, {"add_bos": False}, False, BEGIN, "add_bos_token=False"),
        (TextRecord(eod_id=END, bos_ids=(BEGIN,), special_tokens="parse"), {}, True, BEGIN, ""),
        (
            TextRecord(eod_id=END, bos_ids=(), special_tokens="parse"),
            {},
            False,
            END,
            "add_bos_token=False,prefix_token_id=301",
        ),
    ],
)
def test_texts_begin_and_are_preceded_as_documents_of_training(
    tmp_path: Path,
    tokenizer: str,
    text: TextRecord,
    given: dict[str, Any],
    begins: bool,
    prefix: int,
    arguments: str,
) -> None:
    texts = _texts(tmp_path, tokenizer, text, **given)
    plain = texts.encode("river stone", begin=False)
    assert BEGIN not in plain
    assert texts.encode("river stone") == ([BEGIN] if begins else []) + plain
    assert texts.encode("<|begin|>river stone") == [BEGIN, *plain]  # once, where it is spelt
    assert texts.prefix_id == prefix
    assert (texts.end_ids, texts.end_text) == ({END}, "<|end|>")
    assert [remark.rpartition(",")[2] for remark in texts.remarks] == (
        [arguments.rpartition(",")[2]] if arguments else []
    )
    assert all(remark.endswith(f"...,{arguments}") for remark in texts.remarks)


def test_bytes_are_preceded_by_the_end_of_a_document(tmp_path: Path) -> None:
    texts = _texts(tmp_path, "bytes", size=257)
    assert texts.encode("\u00e9") == [0xC3, 0xA9]
    assert (texts.prefix_id, texts.end_ids, texts.remarks) == (256, {256}, ())
    with assert_refused("id", value=256, constraint="256 ids", remedy="--tokenizer"):
        _texts(tmp_path, "bytes", size=256)


def test_an_imported_model_ends_at_all_tokens_that_it_declared(
    tmp_path: Path, tokenizer: str
) -> None:
    write_checkpoint(tmp_path / "step_0", config())
    write_declared(tmp_path / "step_0", Declared({"eos_token_id": [7, 9]}, None))
    assert _texts(tmp_path, tokenizer).end_ids == {7, 9, END}


def test_what_has_no_beginning_is_refused(tmp_path: Path, tokenizer: str) -> None:
    nameless = str(byte_level(tmp_path / "nameless"))
    with assert_refused("tokenizer", value=nameless, constraint="begin or end", remedy="--eod"):
        _texts(tmp_path, nameless)
    with assert_refused(
        str(tmp_path / "step_0"), value="names", constraint="no tok", remedy="--tokenizer"
    ):
        _texts(tmp_path, None)
    with assert_refused("id", value=BEGIN, constraint="300 ids", remedy="--tokenizer"):
        _texts(tmp_path, tokenizer, size=300).encode("<|begin|>")


def test_without_lm_eval_the_command_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    write_checkpoint(tmp_path / "step_0", config())
    line = ["--checkpoint", str(tmp_path), "--tasks", "piqa,arc_easy", "--device", "cpu"]
    assert evaluate.main(line) == 2
    with assert_refused("tasks", "piqa,arc_easy", "not installed", "pip install 'lm_eval>="):
        raise ValueError(error_line(capsys).removeprefix("error: ").rstrip("\n"))
    # A folder that is missing, and one where nobody can write.
    for folder, remedy in ((tmp_path / "none", "make"), (Path("/proc"), "another")):
        output = str(folder / "results.json")
        assert evaluate.main([*line, "--output", output]) == 2
        with assert_refused("--output", output, "must be a file in a folder", remedy):
            raise ValueError(error_line(capsys).removeprefix("error: ").rstrip("\n"))


def test_results_that_cannot_be_written_have_been_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up during an evaluation of hours."""
    found = {
        "results": {"mine": {"acc,none": 0.25}},
        "n-shot": {"mine": 0},
        "manyformer": {"remarks": ("a remark",)},
    }
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *_, **__: found)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_results", full)
    line = ["--checkpoint", "c", "--tasks", "mine", "--output", str(tmp_path / "results.json")]
    assert evaluate.main(line) == 2
    output = capsys.readouterr()
    assert "0.2500" in output.out
    assert "a remark" in output.out
    assert "wrote" not in output.out
    assert "No space left" in output.err


def test_numbers_and_devices_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "require_lm_eval", lambda tasks: None)
    write_checkpoint(tmp_path / "step_0", config())
    line = ["--checkpoint", str(tmp_path / "step_0"), "--tasks", "piqa"]
    for name, value, constraint, remedy in (
        ("--limit", "inf", "number of questions", "leave"),
        ("--limit", "nan", "number of questions", "leave"),
        ("--device", "tpu", "cannot be used", "cpu"),
        ("--device", "meta", "cannot be used", "cpu"),
    ):
        assert evaluate.main([*line, name, value]) == 2
        with assert_refused(name, value, constraint, remedy):
            raise ValueError(error_line(capsys).removeprefix("error: ").rstrip("\n"))
