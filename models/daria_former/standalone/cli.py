"""The published command lines: daria-train, daria-generate, daria-export.

`daria-train` becomes a run of `pretrain.train` (models.standalone.train_command); under torchrun
every rank does: `torchrun -m models.daria_former.standalone.cli train ...`. Functions import what
needs torch, so that `--help` does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from models.daria_former.config import DariaFormerConfig
from models.standalone.command_line import CommandParser, add_train_options, run_command
from models.standalone.settings_file import read_settings

SIZES = ("small", "base", "large", "b7", "b13", "b70")
PROJECT = "daria-former"


def train(argv: Sequence[str] | None = None) -> int:
    """`daria-train`: replaces this process with the training run; returns only after an error."""
    return run_command(lambda: _train(train_parser().parse_args(argv)))


def generate(argv: Sequence[str] | None = None) -> int:
    """`daria-generate`: prints the prompt and its continuation."""
    return run_command(lambda: _generate(generate_parser().parse_args(argv)))


def export(argv: Sequence[str] | None = None) -> int:
    """`daria-export`: writes a Hugging Face directory."""
    return run_command(lambda: _export(export_parser().parse_args(argv)))


def _train(options: argparse.Namespace) -> None:
    from models.standalone.train_command import run_training

    run_training(options, read_config(options.config), project=PROJECT)


def _generate(options: argparse.Namespace) -> None:
    from models.daria_former.standalone.commands import generate_text

    print(generate_text(options))


def _export(options: argparse.Namespace) -> None:
    from models.daria_former.standalone.commands import export_model

    export_model(options)


def read_config(given: str) -> DariaFormerConfig:
    """A size by its name or by the published name of its file, or a YAML file of settings.

    Raises:
        ValueError: it is none of these, or a setting is wrong.
    """
    path = Path(given)
    if path.is_file():
        return read_settings(path, DariaFormerConfig)
    # The published files of the sizes held exactly these settings.
    size = path.stem.removeprefix("daria_former_")
    if size not in SIZES:
        raise ValueError(f"--config {given} is no file and none of {', '.join(SIZES)}")
    config: DariaFormerConfig = getattr(DariaFormerConfig, size)()
    return config


def train_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "daria-train",
        "Pretrain a Daria-Former on text.",
        usage="%(prog)s --train_data PATH [option ...]",
        example="--train_data corpus.txt --max_steps 1000",
    )
    sizes = f"YAML of settings, or one of {', '.join(SIZES)}"
    parser.add_argument("--config", default="small", help=sizes)
    add_train_options(parser, project=PROJECT)
    return parser


def generate_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "daria-generate",
        "Sample text from a Daria-Former.",
        example="--checkpoint checkpoints --prompt 'Once upon a time'",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, a step_N of it, or checkpoint-N")
    add("--tokenizer", help="instead of the one that the checkpoint names")
    add("--prompt", required=True, help="text to continue")
    add("--max_new_tokens", type=int, default=256, help="tokens to add at most")
    add("--temperature", type=float, default=1.0, help="of the distribution")
    add("--top_k", type=int, default=50, help="0: all")
    add("--top_p", type=float, default=0.9, help="most probable tokens up to this sum")
    add("--greedy", action="store_true", help="the most probable token every time")
    add("--no_variability", action="store_true", help="no penalties for repetition")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--device", default="cpu", help="cpu, cuda")
    return parser


def export_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "daria-export",
        "Write a Hugging Face directory.",
        example="--checkpoint checkpoints --output exported",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="as for daria-generate")
    add("--output", required=True, help="a new directory")
    add("--merge_lora", action="store_true", help="adapters into the weights")
    add("--half", action="store_true", help="fp16")
    add("--hf", action="store_true", help="the only format, so already chosen")
    return parser


if __name__ == "__main__":
    commands = {"train": train, "generate": generate, "export": export}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python -m {__spec__.name} {{{','.join(commands)}}} ...")
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
