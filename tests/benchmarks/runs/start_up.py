"""CPU seconds of four ranks from their launch to the end of a first step, and what they import.

`python -m tests.benchmarks.runs.start_up --against TREE` launches this tree and another one, such
as a worktree of an earlier commit, in turn. Four ranks share the cores, so that CPU seconds decide.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pretrain.config import to_yaml
from tests.benchmarks.timing import Table, machine
from tests.pretrain.tiny_run import tiny_run, write_data

RANKS, ROUNDS = 4, 3
HERE = Path(__file__).resolve().parents[3]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_RANK = "import torch, deepspeed, pretrain.run, parallel.pipeline, parallel.megatron"
# The least that can be imported of each, whoever does it.
FLOORS = {
    "import torch": "import torch",
    "import torch, deepspeed": "import torch, deepspeed",
    "import torch, deepspeed, megatron.core": "import torch, deepspeed, megatron.core",
    "everything a rank imports": _RANK,
}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
_NAMED = ("torch._inductor", "torch._dynamo")  # told apart from the rest of torch


class Spent(NamedTuple):
    cpu: float
    wall: float


def tables(against: Path | None = None) -> Iterator[Table]:
    """Launches in turn with the floors, then the imports of a rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_run(folder)
        trees = {"a run of one step": HERE} | ({} if against is None else {"against": against})
        found: dict[str, list[Spent]] = {name: [] for name in (*trees, *FLOORS)}
        for number in range(ROUNDS):
            for title, tree in reversed(trees.items()) if number % 2 else trees.items():
                found[title].append(_measured(_launch(folder, tree), tree))
            for title, code in FLOORS.items():
                ranks = [[sys.executable, "-W", "ignore", "-c", code]] * RANKS
                found[title].append(_measured(ranks, HERE))
    ours = [spent.cpu for spent in found["a run of one step"]]
    rows = []
    for title, spent in found.items():
        ratios = [each.cpu / own for each, own in zip(spent, ours, strict=True)]
        cpu, wall = (median(values) for values in zip(*spent, strict=True))
        rows.append((title, f"{cpu:.1f}", f"{wall:.1f}", f"{median(ratios):.2f}"))
    yield Table(
        f"{RANKS} processes, medians of {ROUNDS} rounds; the last column is the ratio of a round",
        ("", "CPU seconds", "wall", "of the run's CPU seconds"),
        rows,
    )
    yield _imports()


def _write_run(folder: Path) -> None:
    write_data(folder)
    config = tiny_run(
        folder,
        model__num_layers=24,
        parallel__tensor=2,
        parallel__pipeline=2,
        training__max_steps=1,
        training__warmup_steps=0,
    )
    (folder / "start.yaml").write_text(to_yaml(config))


def _launch(folder: Path, tree: Path) -> list[list[str]]:
    run_dir = tempfile.mkdtemp(dir=folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    script = ["pretrain/train.py", "--config-name", "start", "--config-dir", str(folder)]
    return [[sys.executable, *launcher, *script, f"run_dir={run_dir}"]]


def _measured(commands: Sequence[Sequence[str]], tree: Path) -> Spent:
    """Run them at once from the root of `tree`; the CPU seconds are those of all descendants."""
    environment: Mapping[str, str] = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(tree)}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    running = [
        subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(spent, wall)


def _imports() -> Table:
    """Shares of packages in the time of a rank's imports, and how many modules they have."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "importtime", "-c", _RANK],
        cwd=HERE,
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=True,
    )
    took: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for microseconds, name in _LINE.findall(done.stderr):
        package = next((each for each in _NAMED if name.startswith(each)), name.partition(".")[0])
        took[package] += int(microseconds)
        modules[package] += 1
    rows = [
        (name, f"{modules[name]}", f"{100 * each / took.total():.0f} %")
        for name, each in took.most_common(12)
    ]
    return Table(
        f"Imports of a rank: {modules.total():,} modules",
        ("package", "modules", "of the time"),
        rows,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.runs.start_up")
    parser.add_argument("--against", type=Path, metavar="TREE")
    print(f"## start_up\n\n{machine()}\n", flush=True)
    for table in tables(parser.parse_args().against):
        print(f"{table}\n", flush=True)
