"""Cost of waiting: a training step alone on all cores, and beside an equal job on the same ones.

Every policy has two processes of its own, because libgomp reads its variables once. Alone one of
them runs; beside each other both do, and the speed is their mean. A fair half of the cores is half
of the speed. Intervals in which anything else used the cores are measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from parallel.cpu.threads import POLICY, SPIN, THREADS
from parallel.cpu.wait_policy import CpuTimes, WaitPolicy, cpu_times
from tests.benchmarks.timing import Table

FAMILIES = ("llama", "daria_former")
SEQ_LENGTH, BATCH_SIZE = 256, 2
SECONDS, ROUNDS, WARMUP_STEPS = 2.0, 5, 3
LEAD = 1.2  # seconds before each interval, in which what is ours notices who is there
DISTURBED = 0.15  # cores that anything else may use in an interval
PATIENCE = 200.0  # seconds of a family, with intervals that are measured again
ALONE, BESIDE = "alone", "beside an equal job"
SPINS = "always spin (libgomp's own)"
SLEEPS = "always sleep (OMP_WAIT_POLICY=PASSIVE)"
OURS = "ours: sleep while others are busy"
POLICIES = (SPINS, SLEEPS, OURS, "one thread")
_ROOT = Path(__file__).resolve().parents[2]


class Speed(NamedTuple):
    tokens: float  # a second
    cpu_seconds: float


class Worker:
    """A process that trains whenever it is told to, with variables of its own."""

    def __init__(self, family: str, policy: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in (THREADS, SPIN, POLICY)}
        if policy == SLEEPS:
            environment[POLICY] = "PASSIVE"
        if policy == POLICIES[-1]:
            environment[THREADS] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.shared_cores", family, policy],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{SECONDS}\n")
        self.process.stdin.flush()

    def read(self) -> Speed:
        assert self.process.stdout is not None
        return Speed(*json.loads(self.process.stdout.readline()))


def tables() -> Iterator[Table]:
    """One table a family: tokens a second of every policy, alone and beside its like."""
    for family in FAMILIES:
        with ExitStack() as stack:
            pairs = {
                policy: [stack.enter_context(Worker(family, policy)) for _ in range(2)]
                for policy in POLICIES
            }
            for worker in (worker for pair in pairs.values() for worker in pair):
                worker.read()  # it has warmed up
            yield _table(family, *_measure(pairs))


def _measure(
    pairs: Mapping[str, Sequence[Worker]],
) -> tuple[dict[tuple[str, str], list[float]], int]:
    """Tokens a second by policy and company, in turn; and how many intervals were disturbed."""
    cases = {(name, ALONE): pair[:1] for name, pair in pairs.items()}
    cases |= {(name, BESIDE): pair for name, pair in pairs.items()}
    speeds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    deadline, disturbed = time.monotonic() + PATIENCE, 0
    for number in range(ROUNDS):
        order = list(cases.items())
        for case, workers in order if number % 2 == 0 else reversed(order):
            while (speed := _interval(workers)) is None and time.monotonic() < deadline:
                disturbed += 1
            if speed is not None:
                speeds[case].append(speed)
    return speeds, disturbed


def _interval(workers: Sequence[Worker]) -> float | None:
    """Their mean speed, or None if anything else used the cores."""
    since = cpu_times()
    for worker in workers:
        worker.begin()
    speeds = [worker.read() for worker in workers]
    until = cpu_times()
    others = _others(since, until, sum(speed.cpu_seconds for speed in speeds))
    return None if others > DISTURBED else statistics.mean(speed.tokens for speed in speeds)


def _others(since: CpuTimes | None, until: CpuTimes | None, ours: float) -> float:
    if since is None or until is None:
        return 0.0
    return (until.busy - since.busy - ours) / (until.clock - since.clock)


def _table(family: str, speeds: Mapping[tuple[str, str], list[float]], disturbed: int) -> Table:
    medians = {case: statistics.median(values) for case, values in speeds.items() if values}
    rows = []
    for name in POLICIES:
        alone, beside = medians[name, ALONE], medians[name, BESIDE]
        usual = medians[SPINS, ALONE]
        rows.append(
            [
                name,
                f"{alone:,.0f}",
                f"{alone / usual:.3f}",
                f"{beside:,.0f}",
                f"{beside / usual:.3f}",
            ]
        )
    title = (
        f"{family}/demo, {BATCH_SIZE} x {SEQ_LENGTH} tokens a step, fp32: medians of {ROUNDS} "
        f"intervals of {SECONDS:.0f} s in turn; {disturbed} disturbed ones were measured again"
    )
    header = ["waiting", "alone, tokens/s", "of the usual", "beside an equal job", "of the usual"]
    return Table(title, header, rows)


def _train(family: str, policy: str) -> None:
    """The worker: for every number of seconds on standard input, a line with what came of it."""
    import torch
    import yaml

    from models.base import TokenInputs
    from models.registry import get_config_class, get_family
    from parallel.carry import SequentialModel
    from parallel.context import ParallelContext
    from parallel.cpu.compat import keep_freed_memory

    keep_freed_memory()
    text = (_ROOT / "configs" / "model" / family / "demo.yaml").read_text()
    own, config = get_family(family), get_config_class(family)(**yaml.safe_load(text))
    torch.manual_seed(0)
    model = SequentialModel(own.layer_specs(config), ParallelContext.single())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    stream = torch.randint(config.vocab_size, (BATCH_SIZE, SEQ_LENGTH + 1))
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    wait_policy = None
    if policy == OURS:
        wait_policy = WaitPolicy.of_this_process(ranks=1, threads=torch.get_num_threads())

    def step() -> None:
        if wait_policy is not None:
            wait_policy.adapt()
        output = model(TokenInputs(tokens))
        own.loss(output, labels, config=config, ctx=model.ctx).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARMUP_STEPS):
        step()
    print(json.dumps(Speed(0.0, 0.0)), flush=True)
    for line in sys.stdin:
        cpu = time.process_time()
        _steps_in(LEAD, step)
        begin = time.perf_counter()
        steps = _steps_in(float(line), step)
        rate = steps * BATCH_SIZE * SEQ_LENGTH / (time.perf_counter() - begin)
        print(json.dumps(Speed(rate, time.process_time() - cpu)), flush=True)


def _steps_in(seconds: float, step: Callable[[], None]) -> int:
    steps, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        step()
        steps += 1
    return steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.shared_cores")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("policy", choices=POLICIES)
    _train(**vars(parser.parse_args()))
