"""`python -m pretrain.checkpoint list|verify|prune DIR`: the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.cli import program
from parallel.checkpoint.errors import CheckpointError, one_line
from parallel.checkpoint.manifest import read_manifest, step_of_name, verify_content, verify_listing
from pretrain.errors import EXIT_USER_ERROR

EXIT_DAMAGED = 3
_EXAMPLE = """example:
  %(prog)s verify runs/demo
  %(prog)s prune runs/demo --keep 2
"""


# pretrain.checkpointing imports torch, which takes seconds, for which --help and a mistake do not
# wait: functions import what needs it.


def _describe(path: Path, *, verify: bool) -> tuple[str, bool]:
    from pretrain.checkpointing.selection import TRAINER_NAME

    try:
        manifest = read_manifest(path)
        problem = verify_listing(path, manifest)
        if verify and problem is None:
            problem = verify_content(path, manifest, manifest.files)
        is_known = problem is None and TRAINER_NAME in manifest.files
        ledger = _ledger(path / TRAINER_NAME) if is_known else ""
    except (CheckpointError, OSError, ValueError) as error:
        return f"{path.name}: DAMAGED {one_line(error)}", False
    if problem is not None:
        return f"{path.name}: DAMAGED {problem}", False
    size = sum(entry.size for entry in manifest.files.values()) / 1e9
    state = "verified" if verify else "complete"
    return (
        f"{path.name}: {state}, {len(manifest.files)} files, {size:.2f} GB, {manifest.layout}"
        f"{ledger}",
        True,
    )


def _ledger(trainer_path: Path) -> str:
    """Tokens read from each source, according to the position in the data."""
    from data_tools.loading.loader_state import LoaderState

    trainer = json.loads(trainer_path.read_bytes())
    if "data" not in trainer:
        return ""
    sources = LoaderState.parse(trainer["data"]).sources
    given = ", ".join(f"{name} {source.tokens:,}" for name, source in sources.items())
    return f", tokens: {given}"


def _prune(run_dir: Path, *, keep: int, keep_every: int | None) -> int:
    try:
        if not (run_dir / "checkpoints").is_dir():
            raise CheckpointError(f"{str(run_dir)!r} has no checkpoints: give a run directory")
        from pretrain.checkpointing.retention import prune

        doomed = prune(run_dir, keep=keep, keep_every=keep_every)
    except (CheckpointError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    print("\n".join(f"step_{step}: deleted" for step in doomed) or "nothing to delete")
    return 0


def _checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoint itself, or those of a run or of its folder, newest first."""
    if not directory.is_dir():
        return []
    if step_of_name(directory.name) is not None:
        return [directory]
    from pretrain.checkpointing.directory import steps_in

    folders = [directory / "checkpoints", directory]
    return [f / f"step_{step}" for f in folders for step in reversed(steps_in(f))]


def main(arguments: Sequence[str] | None = None) -> int:
    """List, verify or prune the checkpoints of a run directory; 3: one is damaged.

    `prune` deletes all but the newest ones that are complete; no job may be using the directory.
    """
    parser = argparse.ArgumentParser(
        prog=program("python -m pretrain.checkpoint"),
        description=main.__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        choices=["list", "verify", "prune"],
        help="list: sizes and layout; verify: every checksum, too; prune: delete old ones",
    )
    parser.add_argument("directory", type=Path, help="a run directory, or one of its checkpoints")
    parser.add_argument("--keep", type=int, metavar="N", help="prune: newest ones to keep")
    parser.add_argument(
        "--keep-every", type=int, metavar="STEPS", help="prune: also keep multiples of it"
    )
    options = parser.parse_args(arguments)
    if (options.command == "prune") != (options.keep is not None):
        parser.error("--keep N belongs to prune, and prune needs it")
    if options.command != "prune" and options.keep_every is not None:
        parser.error("--keep-every STEPS belongs to prune; remove it")
    if options.command == "prune":
        return _prune(options.directory, keep=options.keep, keep_every=options.keep_every)
    paths = _checkpoints_in(options.directory.resolve())
    if not paths:
        print(
            f"error: no checkpoint in {str(options.directory)!r}: give a run directory",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    results = [_describe(path, verify=options.command == "verify") for path in paths]
    print("\n".join(line for line, _ in results))
    return 0 if all(good for _, good in results) else EXIT_DAMAGED


if __name__ == "__main__":
    sys.exit(main())
