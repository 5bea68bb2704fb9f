"""Every command line: help on one screen, with an example and every default, before torch."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pretrain.__main__ import COMMANDS
from pretrain.files import ROOT

LINES, COLUMNS = 50, 80
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
ENTRIES = {name: entry for name, entry in SCRIPTS.items() if name != "manyformer"}
ENTRIES |= {name: command.entry for name, command in COMMANDS.items()}


class _Parsing(Exception):
    """A command line has reached the parsing of its arguments."""


def _parsers(
    name: str, monkeypatch: pytest.MonkeyPatch, *, typed: str | None = None
) -> list[argparse.ArgumentParser]:
    """The parser of a command, `typed` as it is or otherwise, and those of its own commands."""
    found: list[argparse.ArgumentParser] = []

    def parse(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise _Parsing

    for method in ("parse_known_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    monkeypatch.setattr(sys, "argv", [typed or name])
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    module, _, function = ENTRIES[name].partition(":")
    with pytest.raises(_Parsing):
        getattr(importlib.import_module(module), function)()
    [parser] = found
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.extend(action.choices.values())
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_usage_names_the_command_that_was_typed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"python -m {COMMANDS[name].module}"
    for parser in _parsers(name, monkeypatch, typed=f"/usr/bin/manyformer {name}"):
        text = parser.format_help()
        assert text.startswith(f"usage: manyformer {name} ")
        assert f"\n  {own} " not in text
    if name not in ("train", "files"):  # started by a launcher, and only there as a command
        assert _parsers(name, monkeypatch)[0].format_help().startswith(f"usage: {own} ")


@pytest.mark.parametrize("name", ENTRIES)
def test_the_help_is_a_screen_with_an_example_and_every_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers = _parsers(name, monkeypatch)
    assert "\nexample" in parsers[0].format_help()
    for parser in parsers:
        lines = parser.format_help().splitlines()
        assert len(lines) <= LINES
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action
            if action.help == argparse.SUPPRESS:
                continue
            if action.default not in (None, False, [], argparse.SUPPRESS):
                assert "default" in (action.help or ""), action.option_strings


def test_a_mistake_and_a_help_do_not_wait_for_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    missing = str(tmp_path / "nowhere")
    calls = [
        *((name, "--help") for name in ENTRIES),
        ("train", "--config-name", "demo", f"data.train={missing}"),
        ("generate", "--checkpoint", missing, "--prompt", "a"),
        ("generate", "--checkpoint", missing, "--prompt", "a", "--top-p", "2"),
        ("convert", "to-hf", "--checkpoint", missing, "--output", "new"),
        ("convert", "from-hf", "--model", missing, "--output", str(tmp_path)),
        ("plot", missing),
        ("checkpoint", "list", missing),
        ("checkpoint", "prune", missing, "--keep", "1"),
        ("evaluate", "--checkpoint", missing, "--tasks", ","),
    ]
    code = (
        "import contextlib, importlib, io, sys\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        f"for name, *arguments in {calls!r}:\n"
        "    sys.argv = [name, *arguments]\n"
        f"    module, _, function = {ENTRIES!r}[name].partition(':')\n"
        "    silent = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):\n"
        "            code = getattr(importlib.import_module(module), function)()\n"
        "    except SystemExit as ended:\n"
        "        code = ended.code\n"
        "    print(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    codes = [0 if call[1] == "--help" else 2 for call in calls]
    assert done.stdout.split("\n")[:-1] == [str(code) for code in codes], done.stderr
