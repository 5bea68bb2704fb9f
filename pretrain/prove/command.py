"""`python -m pretrain.prove`: show that a parallel run is the run in one process."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pretrain.config.compose import compose_config
from pretrain.errors import EXIT_STOPPED, EXIT_USER_ERROR
from pretrain.prove.small_run import SmallRun, shrink

EXIT_PROVEN, EXIT_DIFFERENT = 0, 1

_DESCRIPTION = """\
Show that the parallel run of a run file is the run in one process.

The run file is made small in ratio, with all its features on, and trained for a few steps by the
program itself on several ranks of this machine. A plain loop in one process, in fp64, computes the
same steps. Compared are, by name: initial weights, losses, every gradient, the gradient norm,
weights and optimizer states, the held-out loss, and all of these after a resume at another layout.
"""

_EPILOG = """\
examples:
  python -m pretrain.prove --config-name my_run
  python -m pretrain.prove --config-name demo parallel.tensor=2 --ds_config zero3.json --quick
exit codes: 0 the run is proven, 1 a check failed, 2 the settings cannot be used
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the arguments")


def main(argv: Sequence[str] | None = None) -> int:
    """Prove a run from the command line; returns the exit code."""
    try:
        return _run(_parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_STOPPED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m pretrain.prove",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config-name", default="base", metavar="NAME", help="run file, as in training"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own run files")
    parser.add_argument("--ds_config", "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON")
    parser.add_argument(
        "--depth",
        choices=("quick", "own", "full"),
        default="full",
        help="quick: in fp32, the first step and one resume; own: the same in the precision of the "
        "run; full (default): two steps and two resumes, in fp32 and in the precision of the run",
    )
    parser.add_argument(
        "--quick", action="store_const", dest="depth", const="quick", help="--depth quick"
    )
    parser.add_argument(
        "--random", type=int, metavar="N", help="prove N runs drawn at random instead"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--minutes", type=float, metavar="M", help="end the draws after M minutes")
    parser.add_argument("--family", metavar="NAME", help="draw runs of one family")
    parser.add_argument(
        "--ranks", type=int, default=4, metavar="N", help="most ranks to start here (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of the run")
    return parser.parse_intermixed_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    if arguments.random is not None:
        return _search(arguments)
    config = compose_config(
        arguments.config_name, config_dir=arguments.config_dir, overrides=arguments.overrides
    )
    small = shrink(config, arguments.ds_config, max_ranks=arguments.ranks)
    if not arguments.json:
        print(_preface(small), flush=True)
    from pretrain.prove.proof import Depth, prove  # torch and DeepSpeed take seconds
    from pretrain.prove.ranks import RunFailedError
    from pretrain.prove.report import as_json, is_proven, table

    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        try:
            sections = prove(small, Path(folder), depth=Depth(arguments.depth))
        except RunFailedError as error:
            print(f"not proven: {error}", file=sys.stderr)
            return EXIT_DIFFERENT
    print(as_json(small, sections) if arguments.json else table(sections))
    proven = is_proven(sections)
    if not arguments.json:
        print("\nproven: the parallel run is the run in one process" if proven else "\nNOT PROVEN")
    return EXIT_PROVEN if proven else EXIT_DIFFERENT


def _search(arguments: argparse.Namespace) -> int:
    from pretrain.prove.drawn.search import search

    found = search(
        arguments.random,
        seed=arguments.seed,
        minutes=arguments.minutes,
        family=arguments.family,
        log=lambda line: print(line, flush=True),
    )
    print(found.text)
    return EXIT_DIFFERENT if found.failures else EXIT_PROVEN


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _preface(small: SmallRun) -> str:
    lines = ["shrunk:", *(f"  {change}" for change in small.changes)]
    lines += ["not shown on this machine:", *(f"  {text}" for text in small.unproven)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
