"""`python -m tests.scale [--config-name llama_70b] [--layout tp8pp8] [--ranks 64 1024]`.

A table of what a rank of a run has to do with the others: process groups at the start, files and
elements at a restore. The growth per rank is what to look at.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from statistics import mean

from pretrain.config.schema import RunConfig
from pretrain.errors import EXIT_USER_ERROR, ConfigError
from tests.scale.simulation import Layout, narrow, plan_restores, start_ranks

_HEAD = ("ranks", "data ranks", "groups made", "a rank is in", "files opened", "read / own")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scale", allow_abbrev=False)
    parser.add_argument("--config-name", default="llama_70b", help="run file (%(default)s)")
    parser.add_argument("--layout", type=_layout, default="tp8pp8", help="(%(default)s)")
    parser.add_argument("--ranks", type=_count, nargs="+", default=[64, 1024], help="(64 1024)")
    parser.add_argument("--groups", action="store_true", help="no restores, one rank a stage")
    arguments = parser.parse_args(argv)
    layout: Layout = arguments.layout
    try:  # all of them before the first, which takes minutes
        configs = {n: narrow(arguments.config_name, layout, n) for n in arguments.ranks}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print("| " + " | ".join(_HEAD) + " |\n" + "|---" * len(_HEAD) + "|", flush=True)
    for world_size, config in configs.items():
        row = _row(config, layout, world_size, arguments.groups)
        print("| " + " | ".join(row) + " |", flush=True)
    return 0


def _layout(text: str) -> Layout:
    match = re.fullmatch(r"tp([1-9][0-9]*)pp([1-9][0-9]*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form tp8pp8")
    return Layout(*map(int, match.groups()))


def _count(text: str) -> int:
    if re.fullmatch(r"[1-9][0-9]*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks from 1 on")
    return int(text)


def _row(config: RunConfig, layout: Layout, world_size: int, groups_alone: bool) -> list[str]:
    stages = [layout.ranks_of_stage(n, world_size) for n in range(layout.pipeline)]
    # Parameters stay within a stage: the restores of the first and the last are those of any.
    chosen = [[ranks[0]] for ranks in stages] if groups_alone else [stages[0], stages[-1]]
    found = [start_ranks(config, ranks, world_size) for ranks in chosen]
    groups = [each.groups for stage in found for each in stage.values()]
    row = [
        str(world_size),
        str(world_size // (layout.tensor * layout.pipeline)),
        str(max(each.made.total() for each in groups)),
        str(max(each.joined.total() for each in groups)),
    ]
    if groups_alone:
        return [*row, "", ""]
    restores = [
        each for stage in found for each in plan_restores(stage, tensor=layout.tensor).values()
    ]
    files = [each.num_files for each in restores]
    ratio = sum(each.num_read for each in restores) / sum(each.num_owned for each in restores)
    return [*row, f"{mean(files):.2f}, at most {max(files)}", f"{ratio:.2f}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
