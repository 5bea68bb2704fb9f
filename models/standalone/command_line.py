"""Shared parts of published command lines: one-line errors, training options. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

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
    add("--tokenizer", default="bytes", help="bytes, a path, or a name on the Hugging Face hub")
    add(
        "--seq_len", type=int, help="tokens per training sample; default: 1024, or the model's most"
    )
    add("--lr", type=float, default=1e-4)
    add("--weight_decay", type=float, default=0.01)
    add("--batch_size", type=int, default=4, help="samples per micro-batch and rank")
    add("--max_steps", type=int, default=100_000)
    add("--warmup_steps", type=int, default=1000)
    add("--grad_accum", type=int, default=1, help="micro-batches per step")
    add("--max_grad_norm", type=float, default=1.0)
    add("--save_dir", default="checkpoints", help="directory of the run")
    add("--save_every", type=int, default=1000)
    add("--eval_every", type=int, default=1000)
    add("--log_every", type=int, default=10)
    add("--use_amp", action=argparse.BooleanOptionalAction, default=False, help="bf16")
    add("--no_amp", dest="use_amp", action="store_false", help="fp32")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    add("--wandb_project", help=f"default: {project}")
    add("--resume", help="--save_dir or its newest checkpoint: continue it, or fail")
    add("--num_workers", type=int, help="threads that prepare samples")
