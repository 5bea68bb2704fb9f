"""Examine a run before its job is queued: `python -m pretrain.doctor --help`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_tools.cli import program
from pretrain.config import RunConfig
from pretrain.config.compose import compose_config
from pretrain.config.resolve import ResolvedRun, resolve_run
from pretrain.config.run_length import plan_run
from pretrain.distributed.launcher_env import environment_number, launcher_name
from pretrain.doctor.environment import check_needed_packages, check_pins
from pretrain.doctor.findings import Finding, as_json, as_text, attempt, exit_code, of_message
from pretrain.doctor.layout import check_layout_of_job, smallest_world
from pretrain.doctor.network import check_network
from pretrain.doctor.shared_folder import Task, check_shared_folder
from pretrain.errors import EXIT_USER_ERROR
from pretrain.files import ROOT
from pretrain.train import (
    CommandError,
    OneLineParser,
    add_run_arguments,
    positive_int,
    positive_number,
)

_SECTIONS = (
    "settings",
    "launcher and layout",
    "data",
    "run directory",
    "environment",
    "network",
    "shared folder",
)
_DESCRIPTION = """\
Examine a run before its job is queued: settings, layout, data, space for checkpoints, packages,
network and, under srun, clocks and folders of all nodes. Nothing is trained and no model is built;
the only file written is a probe, which is removed. Exit code 0, also with warnings; 2 with errors.
"""
_EXAMPLE = """\
example:
  %(prog)s --config-name my_run --ranks 512 --ranks-per-node 8
  srun --nodes=16 --ntasks-per-node=1 python -m pretrain.doctor --config-name my_run --ranks 128
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 if a finding is an error."""
    try:
        options = _parse(argv)
        task = Task.of(os.environ)
    except CommandError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    findings = examine(options, task)
    if task is not None and task.rank > 0:  # task 0 has reported what does not depend on the node
        findings = [each for each in findings if each.severity != "ok"]
        host = f"{socket.gethostname()}: "
        findings = [each._replace(section=host + each.section) for each in findings]
        if not findings:
            return exit_code(findings)
    sys.stdout.write(as_json(findings) if options.json else "\n".join(as_text(findings)))
    sys.stdout.write("\n")
    return exit_code(findings)


def examine(options: argparse.Namespace, task: Task | None = None) -> list[Finding]:
    """All findings about the run that the options name; with `task` > 0 those about this node."""
    is_first = task is None or task.rank == 0
    findings = attempt("environment", lambda: list(check_pins(ROOT / "constraints.txt")))
    config: RunConfig | None = None
    settings: ResolvedRun | None = None
    try:
        config = compose_config(
            options.config_name, config_dir=options.config_dir, overrides=options.overrides
        )
        ranks = _ranks(options)
        world = smallest_world(config) if ranks is None else ranks
        settings = resolve_run(config, options.ds_config, world_size=world)
    except ValueError as error:
        return [of_message("settings", "error", str(error)), *(findings if is_first else [])]
    if is_first:
        zero = settings.ds_config.zero_stage
        said = f"{options.config_name}: valid, {config.model.family}, ZeRO-{zero}"
        findings = [Finding("settings", "ok", said), *_of_run(settings, options, ranks), *findings]
        launcher = launcher_name(os.environ)
        findings += attempt(
            "environment", lambda: list(check_needed_packages(config, launcher=launcher))
        )
    findings += _of_node(config, task, world, options)
    return sorted(findings, key=lambda each: _SECTIONS.index(each.section))


def _of_run(settings: ResolvedRun, options: argparse.Namespace, ranks: int | None) -> list[Finding]:
    """Findings that are the same on every node."""
    from pretrain.doctor.data import check_data  # these two import torch; nothing above needs it
    from pretrain.doctor.storage import check_space, existing_folder

    config, layout, _ = settings
    found = attempt(
        "launcher and layout",
        lambda: list(
            check_layout_of_job(
                layout,
                ranks=ranks,
                ranks_per_node=options.ranks_per_node,
                environment=os.environ,
            )
        ),
    )
    found += attempt("data", lambda: list(check_data(config, layout)))
    folder = existing_folder(Path(config.run_dir).absolute())
    return found + attempt(
        "run directory",
        lambda: [check_space(config, folder, total_steps=_total_steps(settings))],
    )


def _of_node(
    config: RunConfig, task: Task | None, world: int, options: argparse.Namespace
) -> list[Finding]:
    """Findings that depend on the node."""
    from pretrain.doctor.storage import check_run_directory, existing_folder

    found = attempt("run directory", lambda: list(check_run_directory(Path(config.run_dir))))
    per_node = options.ranks_per_node
    network = partial(
        check_network,
        os.environ,
        ranks=world,
        has_other_nodes=per_node is not None and world > per_node,
    )
    found += attempt("network", lambda: list(network()))
    if task is not None:
        folder = existing_folder(Path(config.run_dir).absolute())
        shared = partial(check_shared_folder, folder, task, patience=options.patience)
        found += attempt("shared folder", lambda: list(shared()))
    return found


def _total_steps(settings: ResolvedRun) -> int | None:
    """Steps of the run; None if only the data tell."""
    config, layout, _ = settings
    if config.training.max_epochs is not None:
        return None
    return plan_run(config, data_size=layout.data).total_steps


def _ranks(options: argparse.Namespace) -> int | None:
    if options.ranks is not None:
        return int(options.ranks)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return environment_number("WORLD_SIZE")
    return None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog=program("python -m pretrain.doctor"),
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--ranks", type=positive_int, metavar="N", help="ranks of the job (default: the launcher's)"
    )
    parser.add_argument("--ranks-per-node", type=positive_int, metavar="M", help="GPUs of a node")
    parser.add_argument(
        "--patience",
        type=positive_number,
        default=30.0,
        metavar="SECONDS",
        help="under srun: how long to wait for the files of other nodes (default: 30)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
