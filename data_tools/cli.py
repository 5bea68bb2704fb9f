"""Helpers shared by the command lines: text input options, one-line errors, CPU count."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_tools.errors import DataError


def program(otherwise: str) -> str:
    """The command that was typed, if it was `manyformer NAME`."""
    typed = Path(sys.argv[0]).name
    return typed if typed.startswith("manyformer ") else otherwise


def run_command(main: Callable[[Sequence[str]], None]) -> int:
    """Run a command line and return its exit status.

    A user error prints one line to stderr and returns 2; an interrupt returns 130.
    """
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no output was written", file=sys.stderr)
        return 130
    return 0


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by all commands that read text documents."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl (one object per line) or .txt (one document per file), plain, .gz or .zst; "
        ".parquet; folders and globs of these; hf:NAME[:CONFIG][@SPLIT], hf:DIRECTORY",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="of .jsonl objects, or table column, with the text (default: text)",
    )
    parser.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="a document that is not UTF-8, too large or no JSON with the key (default: error)",
    )


def refuse_below(lowest: int, options: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below `lowest`; None is an option that was not given.

    Raises:
        DataError: names the first such option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < lowest:
            option = f"--{name.replace('_', '-')}"
            raise DataError(f"{option} {value} must be {lowest} or more; raise it")


def usable_cpus() -> int:
    """Return the number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
