"""`python -m pretrain.prove`: show that a parallel run is the run in one process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from data_tools.cli import program
from pretrain.config.compose import compose_config
from pretrain.errors import EXIT_STOPPED, EXIT_USER_ERROR
from pretrain.prove.errors import RunFailedError
from pretrain.prove.machine import check_fits
from pretrain.prove.small_run import SmallRun, shrink
from pretrain.train import (
    CommandError,
    OneLineParser,
    add_run_arguments,
    positive_int,
    positive_number,
)

EXIT_PROVEN, EXIT_DIFFERENT = 0, 1
_RANKS = 4
# Options that a search does not read, and those that it alone reads.
_OF_A_RUN = (
    "config_name",
    "config_dir",
    "ds_config",
    "depth",
    "ranks",
    "resume_batch",
    "full",
    "timeout",
    "json",
    "overrides",
)
_OF_A_SEARCH = ("seed", "minutes", "family")

_DESCRIPTION = """\
Show that the parallel run of a run file is the run in one process.

The run file is made small, with all its features on and at most two ranks on an axis, and trained
for a few steps by the program itself on several ranks of this machine. A plain loop in one
process, in fp64, computes the same steps. Compared are, by name: initial weights, losses, every
gradient, the gradient norm, weights and optimizer states, the held-out loss, and all of these after
a resume at another layout.
"""

_EPILOG = """\
examples:
  %(prog)s --config-name my_run
  %(prog)s --config-name demo parallel.tensor=2 --ds_config zero3.json --quick
exit codes: 0 the run is proven, 1 a check failed or a rank did, 2 the settings cannot be used,
75 stopped by a signal
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prove a run from the command line; returns the exit code."""
    try:
        return _run(_parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("stopped: nothing is left behind\n")
        return EXIT_STOPPED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog=program("python -m pretrain.prove"),
        usage="%(prog)s [--config-name NAME] [option ...] [key=value ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--depth",
        choices=("quick", "own", "full"),
        help="quick: in fp32, the first step and one resume; own: the same in the precision of the "
        "run; full (default): two steps and two resumes, in fp32 and in the precision of the run",
    )
    parser.add_argument(
        "--quick", action="store_const", dest="depth", const="quick", help="--depth quick"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="leave model, layout and batch as they are; takes as many ranks, and the memory",
    )
    parser.add_argument(
        "--timeout",
        type=positive_int,
        metavar="SECONDS",
        help="limit of each start of the program, and of the run in one process (default: 300)",
    )
    parser.add_argument(
        "--random", type=positive_int, metavar="N", help="prove N runs drawn at random instead"
    )
    parser.add_argument("--seed", type=int, help="of the draws (default: 0)")
    parser.add_argument(
        "--minutes", type=positive_number, metavar="M", help="end the draws after M minutes"
    )
    parser.add_argument("--family", metavar="NAME", help="draw runs of one family")
    parser.add_argument(
        "--ranks", type=positive_int, metavar="N", help="most ranks to start here (default: 4)"
    )
    parser.add_argument(
        "--resume-batch",
        type=positive_int,
        metavar="N",
        help="let the batch be N times as large after the resume (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_intermixed_args(argv)
    _refuse_without_effect(arguments, parser)
    return arguments


def _refuse_without_effect(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options of a search beside a run file, and the other way round."""
    is_search = arguments.random is not None
    others = _OF_A_RUN if is_search else _OF_A_SEARCH
    for name in others:
        if (getattr(arguments, name) or None) != (parser.get_default(name) or None):
            option = "key=value" if name == "overrides" else f"--{name.replace('_', '-')}"
            reason = "with --random" if is_search else "without --random"
            raise CommandError(f"{option} has no effect {reason}; leave it out")


def _run(arguments: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if arguments.random is not None:
        return _search(arguments)
    config = compose_config(
        arguments.config_name, config_dir=arguments.config_dir, overrides=arguments.overrides
    )
    small = shrink(
        config,
        arguments.ds_config,
        max_ranks=arguments.ranks or _RANKS,
        resume_batch=arguments.resume_batch or 1,
        whole=arguments.full,
    )
    if arguments.full:
        check_fits(small)
    if not arguments.json:
        print(_preface(small), flush=True)
    try:
        with _stdout_to_stderr(), tempfile.TemporaryDirectory(prefix="prove-") as folder:
            from pretrain.prove.proof import TIMEOUT, Depth, prove  # torch takes seconds
            from pretrain.prove.report import as_json, is_proven, table

            depth, timeout = Depth(arguments.depth or "full"), arguments.timeout or TIMEOUT
            sections = prove(small, Path(folder), depth=depth, timeout=timeout)
    except RunFailedError as error:
        if arguments.json:
            print(json.dumps({"proven": False, "error": str(error)}, indent=2))
        sys.stderr.write(f"not proven: {error}\n")
        return EXIT_DIFFERENT
    print(as_json(small, sections) if arguments.json else table(sections))
    proven = is_proven(sections)
    if not arguments.json:
        print("\nproven: the parallel run is the run in one process" if proven else "\nNOT PROVEN")
    return EXIT_PROVEN if proven else EXIT_DIFFERENT


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries print to stderr, in this process and in those it forks."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _search(arguments: argparse.Namespace) -> int:
    from pretrain.prove.drawn.search import search

    found = search(
        arguments.random,
        seed=arguments.seed or 0,
        minutes=arguments.minutes,
        family=arguments.family,
        log=lambda line: print(line, flush=True),
    )
    print(found.text)
    return EXIT_DIFFERENT if found.failures or not found.proven else EXIT_PROVEN


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _preface(small: SmallRun) -> str:
    lines = ["shrunk:", *(f"  {change}" for change in small.changes)]
    lines += ["not shown on this machine:", *(f"  {text}" for text in small.unproven)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
