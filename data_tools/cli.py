"""What the command lines share: text inputs, one-line errors, progress."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from data_tools.errors import DataError


def run_command(main: Callable[[Sequence[str]], None]) -> int:
    """Run a command line; its exit status is 2, with one line on stderr, for a user's error."""
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
    """Where text comes from: what every command that reads documents takes."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl (one object a line) or .txt (one document a file), plain, .gz or .zst; "
        ".parquet; directories and globs of them; hf:NAME[:CONFIG][@SPLIT] of Hugging Face's hub, "
        "or hf:DIRECTORY",
    )
    parser.add_argument(
        "--json-key", default="text", help="key of .jsonl objects, or column, that holds the text"
    )
    parser.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="what to do with a document that is not UTF-8, too large or not the JSON expected",
    )


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
