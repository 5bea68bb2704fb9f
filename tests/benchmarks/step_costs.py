"""The three largest costs of each family's step by kind of operator, beside the least of each.

A step in the engine of a run, fp32, of the size that `make demo` trains. The floor of products and
attention is their FLOPs at the rate of a large product, that of all else its bytes at the rate of a
large copy, both measured in this run. With one thread seconds are CPU seconds.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import yaml

from models.registry import family_names
from pretrain.distributed.process_groups import process_group
from tests.benchmarks.operators import Operators, Rates, Spent, floor_seconds, measure_rates
from tests.benchmarks.step import clock
from tests.benchmarks.timing import Table
from tests.benchmarks.training import OurStep, random_batch, run_config, start_engine

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
BATCH_SIZE, SEQ_LENGTH = 8, 256
STEPS, LARGEST = 5, 3


def tables() -> Iterator[Table]:
    """One table of all families."""
    rates = measure_rates(clock=clock())
    with process_group() as device:
        rows = [row for name in family_names() for row in _rows(name, rates, device)]
    yield Table(
        f"{BATCH_SIZE} x {SEQ_LENGTH} tokens, {torch.get_num_threads()} threads, medians of "
        f"{STEPS} steps; {rates.flops / 1e9:.0f} GFLOP/s of a product, "
        f"{rates.num_bytes / 1e9:.1f} GB/s of a copy",
        ("", "ms", "of the step", "floor ms", "over floor"),
        rows,
    )


def _rows(name: str, rates: Rates, device: torch.device) -> list[tuple[str, ...]]:
    model = yaml.safe_load((CONFIGS / name / "demo_wide.yaml").read_text())
    config = run_config(
        model | ({"vocab_size": 257} if "vocab_size" not in model else {}),
        seq_length=SEQ_LENGTH,
        batch_size=BATCH_SIZE,
        precision="fp32",
    )
    seconds, steps = [], []
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
        step = OurStep(start_engine(config, device=device))
    for number in range(1 + STEPS):
        batch = random_batch(config, seed=number)
        begin = clock()()
        step(batch)
        middle = clock()()
        with Operators(clock()) as operators:
            step(batch)
        if number:  # the first warms up
            seconds.append(middle - begin)
            steps.append(operators)
    whole = median(seconds)
    kinds = {kind: _median([each.by_kind[kind] for each in steps]) for kind in steps[0].by_kind}
    largest = sorted(kinds.items(), key=lambda item: -item[1].seconds)[:LARGEST]
    outside = whole - sum(spent.seconds for spent in kinds.values())
    rows = [(f"{name}: a step", f"{1e3 * whole:.0f}", "", "", "")]
    for kind, spent in largest:
        floor = floor_seconds(spent, rates)
        rows.append(
            (
                f"{name}: {kind}",
                f"{1e3 * spent.seconds:.1f}",
                f"{spent.seconds / whole:.0%}",
                f"{1e3 * floor:.1f}",
                f"{spent.seconds / floor:.2f}",
            )
        )
    rows.append((f"{name}: Python", f"{1e3 * outside:.1f}", f"{outside / whole:.0%}", "", ""))
    return rows


def _median(spent: list[Spent]) -> Spent:
    return Spent(median(each.seconds for each in spent), spent[0].flops, spent[0].num_bytes)
