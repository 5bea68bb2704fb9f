"""Shared parts of published command lines: one-line errors, training options. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others, and whose help gives an
    example and every default."""

    def __init__(
        self, prog: str, description: str, *, example: str, usage: str | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=f"example:\n  {prog} {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As usual, with the default at the end of the help unless it says "default" itself."""
        text, default = settings.get("help", ""), settings.get("default")
        if default not in (None, False, argparse.SUPPRESS) and "default" not in text:
            settings["help"] = f"{text} (default: %(default)s)".strip()
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def run_command(command: Callable[[], None]) -> int:
    """Run a command; a user error prints one line to standard error and returns 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def add_train_options(parser: argparse.ArgumentParser, *, project: str) -> None:
    """The options of `models.standalone.train_command.run_training`."""
    add = parser.add_argument
    add("--train_data", required=True, help="text file, directory or glob")
    add("--eval_data", help="held-out text")
    add("--tokenizer", default="bytes", help="bytes, a path, or a name on the hub")
    add("--seq_len", type=int, help="of a sample (default: 1024, or the model's most)")
    add("--lr", type=float, default=1e-4, help="largest learning rate")
    add("--weight_decay", type=float, default=0.01, help="of matrices")
    add("--batch_size", type=int, default=4, help="of a rank")
    add("--max_steps", type=int, default=100_000, metavar="N", help="steps of the run")
    add("--warmup_steps", type=int, default=1000, metavar="N", help="of the rate")
    add("--grad_accum", type=int, default=1, help="micro-batches per step")
    add("--max_grad_norm", type=float, default=1.0, metavar="X", help="clipped at it")
    add("--save_dir", default="checkpoints", help="the run")
    add("--save_every", type=int, default=1000, metavar="N", help="steps")
    add("--eval_every", type=int, default=1000, metavar="N", help="steps")
    add("--log_every", type=int, default=10, metavar="N", help="steps")
    add("--use_amp", action=argparse.BooleanOptionalAction, default=False, help="bf16")
    add("--no_amp", dest="use_amp", action="store_false", help="fp32 (default)")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    add("--wandb_project", help=f"default: {project}")
    add("--resume", help="--save_dir or its newest checkpoint: continue it, or fail")
    add("--num_workers", type=int, help="threads that prepare samples")
