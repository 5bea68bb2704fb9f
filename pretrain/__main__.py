"""The command `manyformer`: every command line of the project by one name.

`manyformer plot ARGUMENTS` is `python -m pretrain.plot ARGUMENTS`. Only the module of the chosen
command is imported, and its exit code is passed on.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import EXIT_USER_ERROR


class Command(NamedTuple):
    """A command line: its place, as `module:function`, what it does, and the commands that it has
    itself."""

    entry: str
    summary: str
    parts: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        name = self.entry.partition(":")[0]
        return name.removesuffix(".__main__").removesuffix(".command")


# Section -> name -> command.
SECTIONS: dict[str, dict[str, Command]] = {
    "a run": {
        "train": Command("pretrain.train:main", "pretrain a model, here in one process"),
        "doctor": Command("pretrain.doctor.__main__:main", "find what would stop a job"),
        "prove": Command("pretrain.prove.command:main", "show that it equals the one-process run"),
        "plot": Command("pretrain.plot:main", "draw its loss curve"),
        "checkpoint": Command(
            "pretrain.checkpoint:main",
            "list, verify or prune its checkpoints",
            ("list", "verify", "prune"),
        ),
    },
    "a model": {
        "generate": Command("models.generate:main", "sample text from a checkpoint"),
        "evaluate": Command("models.evaluate:main", "score it on tasks of lm_eval"),
        "convert": Command(
            "models.convert:main",
            "to Hugging Face and back, to GGUF",
            ("to-hf", "from-hf", "to-gguf"),
        ),
    },
    "a corpus": {
        "demo-corpus": Command("data_tools.demo_corpus:command", "make one of Python's source"),
        "train-tokenizer": Command("data_tools.train_tokenizer:command", "learn a vocabulary"),
        "preprocess": Command("data_tools.preprocess:command", "turn text into token ids"),
        "convert-corpus": Command("data_tools.convert:command", "to or from other projects"),
        "inspect-corpus": Command("data_tools.inspect_corpus:command", "statistics and samples"),
        "merge": Command("data_tools.merge:command", "join corpora"),
        "split": Command("data_tools.split:command", "hold out documents"),
        "verify": Command("data_tools.verify:command", "check every offset, id and checksum"),
    },
    "this program": {
        "files": Command("pretrain.files:main", "where configs/ and launchers/ are"),
    },
}
COMMANDS = {name: command for section in SECTIONS.values() for name, command in section.items()}
SHELLS = ("bash", "zsh")

_EXAMPLE = """\
example:
  manyformer demo-corpus --output data/demo
  manyformer train --config-name demo training.max_steps=50
Several processes: a launcher starts a module or a file and not this command, as in
`deepspeed --num_gpus 8 --module pretrain.train --config-name demo`.
Completion: eval "$(manyformer completion bash)"    # or zsh, in ~/.bashrc or ~/.zshrc
"""
_COMPLETION_HELP = """\
usage: manyformer completion bash|zsh

Print a script that completes commands, options and files.

example:
  eval "$(manyformer completion bash)"    # in ~/.bashrc; zsh in ~/.zshrc, after compinit
"""


def main() -> int:
    """Run the command that the first argument names; returns its exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(describe())
        return 0
    if name in ("--version", "version"):
        sys.stdout.write(f"manyformer {_version()}\n")
        return 0
    if name == "completion":
        return _print_completion(arguments)
    if name not in COMMANDS:
        return _refuse(f"{name!r} is no command of manyformer", name, [*COMMANDS, "completion"])
    module, _, function = COMMANDS[name].entry.partition(":")
    # The name in the usage of the command.
    sys.argv[:2] = [f"{sys.argv[0]} {name}"] if _is_manyformer() else [sys.argv[0]]
    code: int = getattr(importlib.import_module(module), function)()
    return code


def _is_manyformer() -> bool:
    return Path(sys.argv[0]).name == "manyformer"


def _version() -> str:
    """That of the package, of which these files may be a newer clone."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("manyformer")
    except PackageNotFoundError:  # a clone that is not installed
        return "(not installed)"


def describe() -> str:
    """The text of `manyformer --help`."""
    lines = ["usage: manyformer COMMAND [ARGUMENTS]    (COMMAND --help: its arguments)", ""]
    for section, commands in SECTIONS.items():
        lines.append(f"{section}:")
        lines += [
            f"  {name:<16} {command.summary:<40} python -m {command.module}"
            for name, command in commands.items()
        ]
    lines.append(f"  {'completion':<16} print the completion of {' or '.join(SHELLS)}")
    lines.append(f"  {'--version':<16} print the version")
    return "\n".join(lines) + "\n\n" + _EXAMPLE


def _refuse(problem: str, given: str, names: Sequence[str]) -> int:
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}? " if near else ""
    sys.stderr.write(f"error: {problem}; {remedy}manyformer --help lists all\n")
    return EXIT_USER_ERROR


def _print_completion(arguments: Sequence[str]) -> int:
    if arguments in (["--help"], ["-h"]):
        sys.stdout.write(_COMPLETION_HELP)
        return 0
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        given = " ".join(arguments)
        return _refuse(f"completion {given!r} is none of {', '.join(SHELLS)}", given, SHELLS)
    sys.stdout.write(completion(arguments[0]))
    return 0


def completion(shell: str) -> str:
    """A script that completes names of commands, then options, which --help knows, and files.

    The word after a command may be one of its own, such as `to-hf`, whose help is then asked for.
    The examples at the end of a help have options of other programs.
    """
    names = " ".join([*COMMANDS, "completion"])
    if shell == "zsh":
        return _ZSH.format(names=names)
    parts = {name: command.parts for name, command in COMMANDS.items()} | {"completion": SHELLS}
    cases = (f'{name}) words="{" ".join(own)}";;' for name, own in parts.items() if own)
    return _BASH.format(names=names, cases=" ".join(cases))


_BASH = r"""_manyformer() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words="" part=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{names}"
    elif [ "${{word#-}}" != "$word" ]; then
        if [[ $COMP_CWORD -gt 2 && ${{COMP_WORDS[2]}} =~ ^[a-z][a-z-]*$ ]]; then
            part="${{COMP_WORDS[2]}}"
        fi
        words="$("${{COMP_WORDS[0]}}" "${{COMP_WORDS[1]}}" $part --help 2>/dev/null |
            sed '/^example/,$d' | grep -oE -e '--[a-z][a-z_-]+' | sort -u)"
    elif [ "$COMP_CWORD" -eq 2 ]; then
        case "${{COMP_WORDS[1]}}" in {cases} esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _manyformer manyformer
"""

_ZSH = r"""_manyformer() {{
    if (( CURRENT == 2 )); then
        compadd -- {names}
    elif [[ $PREFIX == -* ]]; then
        local part=""
        if (( CURRENT > 3 )) && [[ $words[3] == [a-z]* && $words[3] != *[^a-z-]* ]]; then
            part=$words[3]
        fi
        compadd -- ${{(f)"$($words[1] $words[2] $part --help 2>/dev/null |
            sed '/^example/,$d' | grep -oE -e '--[a-z][a-z_-]+' | sort -u)"}}
    else
        _files
    fi
}}
compdef _manyformer manyformer
"""


if __name__ == "__main__":
    sys.exit(main())
