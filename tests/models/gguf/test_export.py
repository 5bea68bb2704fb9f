"""Refusals of the command, without the package `gguf`; test_file.py reads what it writes."""

from __future__ import annotations

import sys

import pytest

from models import convert
from models.gguf.export import to_gguf
from parallel.checkpoint.manifest import UNKNOWN_TEXT, TextRecord
from tests.data_tools.tokenization.tokenizer_folders import byte_level
from tests.models.checkpoints import config, write_checkpoint
from tests.models.gguf.shapes import SHAPES
from tests.refusals import assert_refused, error_line


def test_a_model_that_llama_cpp_does_not_have_is_one_line(tmp_path, capsys):
    case = SHAPES["dtf"]
    routed = case.config.model_copy(update={"capacity_gamma": 0.5})
    write_checkpoint(tmp_path / "step_1", routed, family=case.family_of())
    line = ["to-gguf", "--checkpoint", str(tmp_path / "step_1"), "--output", str(tmp_path / "m")]
    assert convert.main(line) == 2
    assert "capacity_gamma=0.5" in error_line(capsys)
    assert not (tmp_path / "m").exists()


def test_without_the_package_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    write_checkpoint(tmp_path / "step_1", config())
    with assert_refused("to-gguf", value="gguf", constraint="imported", remedy="pip install gguf"):
        to_gguf(tmp_path / "step_1", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize(
    ("text", "eod", "value", "constraint"),
    [
        (UNKNOWN_TEXT, None, "end", "llama.cpp"),
        (TextRecord(bos_ids=(3, 4)), "<a>", "[3, 4]", "one at most"),
        (UNKNOWN_TEXT, "<b>", 301, "vocab_size=301"),
    ],
)
def test_ends_that_llama_cpp_cannot_know_are_refused(text, eod, value, constraint, tmp_path):
    folder = byte_level(tmp_path / "t", ["<a>", "<b>"])
    write_checkpoint(tmp_path / "s", config(), tokenizer=str(folder), text=text)
    with assert_refused("tokenizer", value=value, constraint=constraint, remedy=""):
        to_gguf(tmp_path / "s", tmp_path / "m.gguf", eod=eod)


def test_an_end_token_without_a_tokenizer_is_refused(tmp_path):
    write_checkpoint(tmp_path / "s", config(), tokenizer=None)
    with assert_refused("--eod", value="<a>", constraint="no effect", remedy="remove"):
        to_gguf(tmp_path / "s", tmp_path / "m.gguf", eod="<a>")
