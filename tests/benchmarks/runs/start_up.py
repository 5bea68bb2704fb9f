"""CPU seconds of four ranks from their launch to the end of a first step, and what they import.

`python -m tests.benchmarks.runs.start_up --against TREE` launches this tree and another one, such
as a worktree of an earlier commit, in turn. Four ranks share the cores, so that CPU seconds decide.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import yaml

from tests.benchmarks.timing import Table, machine
from tests.pretrain.tiny_run import tiny_run, write_data

RANKS, ROUNDS = 4, 2
HERE = Path(__file__).resolve().parents[3]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
# What a rank at tensor size 2 imports, in the order in which it does. Megatron-Core's own imports
# come one by one, each with all that only it needs.
LAPS = {
    "settings": "import pretrain.train, pretrain.config.compose, pretrain.config.resolve",
    "torch": "import torch",
    "the rest of this project": "import pretrain.run",
    "DeepSpeed": "import deepspeed, parallel.pipeline",
    "for Megatron-Core: DTensor, with sympy": "import torch.distributed._tensor",
    "for Megatron-Core: torch._dynamo": "import torch._dynamo.backends.registry",
    "for Megatron-Core: torch._inductor": "import torch._inductor.compile_fx",
    "for Megatron-Core: wandb": "import wandb",
    "for Megatron-Core: tensorboard": "import torch.utils.tensorboard",
    "Megatron-Core itself": "import parallel.megatron",
}
# The least that can be imported of each, whoever does it.
FLOORS = {
    "import torch, deepspeed": "import torch, deepspeed",
    "import torch, deepspeed, megatron.core": "import torch, deepspeed, megatron.core",
}


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
    # Without what is not set, since an earlier tree has fewer settings.
    values = config.model_dump(mode="json", exclude_unset=True)
    (folder / "start.yaml").write_text(yaml.safe_dump(values))


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
    """CPU seconds of a rank's imports, one after the other in one process."""
    laps = "".join(f"{code}\nprint('LAP', time.process_time())\n" for code in LAPS.values())
    script = f"import gc, time\ngc.disable()\nprint('LAP', time.process_time())\n{laps}"
    rounds = []
    for _ in range(ROUNDS):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            cwd=HERE,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = [line.split() for line in done.stdout.splitlines()]
        clock = [float(line[1]) for line in lines if line[:1] == ["LAP"]]
        rounds.append([after - before for before, after in itertools.pairwise(clock)])
    medians = [median(each) for each in zip(*rounds, strict=True)]
    return Table(
        f"CPU seconds of the imports of a rank, {sum(medians):.1f} in all: medians of {ROUNDS}",
        ("", "seconds"),
        [(name, f"{each:.2f}") for name, each in zip(LAPS, medians, strict=True)],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.runs.start_up")
    parser.add_argument("--against", type=Path, metavar="TREE")
    print(f"## start_up\n\n{machine()}\n", flush=True)
    for table in tables(parser.parse_args().against):
        print(f"{table}\n", flush=True)
