"""The command `manyformer`: one name for every command line, which imports the chosen one alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from pretrain.__main__ import COMMANDS, SHELLS, completion, describe, main
from pretrain.files import ROOT

HELP_LINES = 50  # a screen


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/manyformer", *arguments])
    return main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",), ("-h",)])
def test_the_help_is_a_screen_that_lists_every_command(arguments, monkeypatch, capsys):
    assert _call(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert text == describe()
    assert len(text.splitlines()) <= HELP_LINES
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "\nexample:\n  manyformer " in text


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("trian", "'train'"), ("preproces", "'preprocess'"), ("inspect", "'inspect-corpus'")],
)
def test_an_unknown_command_gets_the_nearest_name(given, nearest, monkeypatch, capsys):
    assert _call(monkeypatch, given) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert repr(given) in output.err
    assert nearest in output.err
    assert "manyformer --help" in output.err


def test_a_command_gets_its_arguments_and_its_exit_code_is_passed_on(monkeypatch, capsys, tmp_path):
    assert _call(monkeypatch, "files") == 0
    assert capsys.readouterr().out == f"{ROOT}\n"
    missing = str(tmp_path / "nowhere")
    assert _call(monkeypatch, "plot", missing) == 2
    assert missing in capsys.readouterr().err
    monkeypatch.setattr("pretrain.files.main", lambda: 75)
    assert _call(monkeypatch, "files") == 75
    with pytest.raises(SystemExit) as ended:
        _call(monkeypatch, "plot", "--no-such-option")
    assert ended.value.code == 2


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert _call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"manyformer {version('manyformer')}\n"


def test_a_command_knows_the_name_under_which_it_was_typed(monkeypatch, capsys):
    for arguments in (("plot", "--no-such-option"), ("convert", "to-hf")):
        with pytest.raises(SystemExit):
            _call(monkeypatch, *arguments)
        assert f"\nmanyformer {arguments[0]}" in capsys.readouterr().err


def test_only_the_chosen_command_is_imported():
    code = (
        "import sys; sys.argv = ['manyformer', 'files']\n"
        "from pretrain.__main__ import main; main()\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'matplotlib', 'pretrain.train'}\n"
        "print(heavy & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{ROOT}\nset()\n"


def test_bash_completes_commands_then_options():
    bash = shutil.which("bash")
    assert bash is not None
    script = completion("bash") + (
        "manyformer() { if [ $2 = to-hf ]; then printf -- '[--plain]\\n'; else\n"
        "printf -- 'usage: [--output OUTPUT] [--quick]\\nexample:\\n  other --own\\n'; fi; }\n"
        "COMP_WORDS=(manyformer t); COMP_CWORD=1; _manyformer; echo ${COMPREPLY[@]}\n"
        "COMP_WORDS=(manyformer plot --o); COMP_CWORD=2; _manyformer; echo ${COMPREPLY[@]}\n"
        "COMP_WORDS=(manyformer plot ''); COMP_CWORD=2; _manyformer; echo ${#COMPREPLY[@]}\n"
        "COMP_WORDS=(manyformer convert t); COMP_CWORD=2; _manyformer; echo ${COMPREPLY[@]}\n"
        "COMP_WORDS=(manyformer convert to-hf --p); COMP_CWORD=3; _manyformer\n"
        "echo ${COMPREPLY[@]}\n"
    )
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "train train-tokenizer\n--output\n0\nto-hf to-gguf\n--plain\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name].parts])
def test_the_commands_of_a_command_are_those_of_its_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        _call(monkeypatch, name, "--help")
    said = capsys.readouterr().out
    listed = re.search(r"\{([a-z,-]+)\}", said)
    own = listed[1].split(",") if listed else re.findall(r"^ {4}([a-z-]+) ", said, re.MULTILINE)
    assert sorted(own) == sorted(COMMANDS[name].parts)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_the_completion_of_zsh_is_a_valid_script():
    done = subprocess.run(["zsh", "-n"], input=completion("zsh"), text=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_knows_every_command(shell, monkeypatch, capsys):
    assert _call(monkeypatch, "completion", shell) == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in f" {text}".replace('"', " ") for name in COMMANDS)


def test_the_completion_explains_itself(monkeypatch, capsys):
    assert _call(monkeypatch, "completion", "--help") == 0
    said = capsys.readouterr()
    assert "usage: manyformer completion bash|zsh" in said.out
    assert said.err == ""


@pytest.mark.parametrize("arguments", [(), ("fish",), ("bash", "zsh")])
def test_a_completion_of_no_known_shell_is_refused(arguments, monkeypatch, capsys):
    assert _call(monkeypatch, "completion", *arguments) == 2
    assert "bash, zsh" in capsys.readouterr().err
