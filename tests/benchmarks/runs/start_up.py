"""CPU seconds to a first step or token of one rank, to a first step of four, and of their imports.

`python -m tests.benchmarks.runs.start_up --against TREE` launches this tree and another one, such
as a worktree of an earlier commit, in turn. Ranks share the cores, so that CPU seconds decide.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import yaml

from tests.benchmarks.timing import Table, machine
from tests.pretrain.tiny_run import tiny_run, write_data

RANKS, ROUNDS, ROUNDS_ALONE = 4, 2, 5
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


STEP, TOKEN = "the first step of the demo model", "the first token of models.generate"
# What each takes longer than, in turn with it.
ALONE = {STEP: "import torch, deepspeed", TOKEN: "import torch"}


class Spent(NamedTuple):
    cpu: float
    wall: float


def tables(against: Path | None = None) -> Iterator[Table]:
    """One rank, then launches of four in turn with the floors, then the imports of a rank."""
    with tempfile.TemporaryDirectory() as name:
        yield _one_rank(Path(name))
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


def _one_rank(folder: Path) -> Table:
    """From the command to the line of the first step, and to the end of one token's generation."""
    corpus = folder / "demo"
    _measured([[sys.executable, "-m", "data_tools.demo_corpus", "--output", str(corpus)]], HERE)
    data = [f"data.{split}={corpus / split}" for split in ("train", "validation")]
    train = ["pretrain/train.py", "--config-name", "demo", "model=llama/demo", *data]
    train += [f"data.tokenizer={corpus / 'tokenizer.model'}", f"run_dir={folder / 'run'}"]
    train += ["training.max_steps=1", "training.warmup_steps=0", "evaluation.max_windows=4"]
    generate = ["-m", "models.generate", "--checkpoint", str(folder / "run")]
    commands = {
        STEP: [*train, "training.log_interval=1"],
        TOKEN: [*generate, "--prompt", "def", "--max-new-tokens", "1"],
    }
    rows = []
    for title, command in commands.items():
        found: dict[str, list[Spent]] = {title: [], ALONE[title]: []}
        for _ in range(ROUNDS_ALONE):
            if title == STEP:
                shutil.rmtree(folder / "run", ignore_errors=True)
            marker = "step 1/1 | loss" if title == STEP else None
            found[title].append(_until([sys.executable, "-W", "ignore", *command], marker))
            alone = [sys.executable, "-W", "ignore", "-c", ALONE[title]]
            found[ALONE[title]].append(_until(alone, None))
        own, least = found[title], found[ALONE[title]]
        ratios = [a.cpu / b.cpu for a, b in zip(own, least, strict=True)]
        for name, spent in found.items():
            cpu, wall = (median(values) for values in zip(*spent, strict=True))
            over = f"{median(ratios):.2f}x" if name == title else ""
            rows.append((name, f"{cpu:.1f}", f"{wall:.1f}", over))
    return Table(
        f"One rank, medians of {ROUNDS_ALONE} rounds",
        ("", "CPU seconds", "wall", "CPU seconds over the import below"),
        rows,
    )


def _until(command: Sequence[str], marker: str | None) -> Spent:
    """Spent by one process until it prints a line with `marker`, or to its end."""
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(HERE)}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        spent, lines = None, []
        for line in process.stdout:
            lines.append(line)
            if marker is not None and marker in line:
                times = psutil.Process(process.pid).cpu_times()
                spent = Spent(times.user + times.system, time.perf_counter() - begin)
    assert process.returncode == 0, "".join(lines)
    if spent is None:
        assert marker is None, "".join(lines)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        spent = Spent(cpu, time.perf_counter() - begin)
    return spent


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
