"""Recall by the Hebbian memory: pairs of a key and a value from beyond the reach of the attention.

A row names 4 pairs, then come fillers, then every key again in another order: what comes next is
its value, one of 16. A unit is a patch, its key the last byte that a latent sees before it predicts
the value; a byte inside a patch asks the trunk nothing, so a key there could not be looked up. Two
blocks of window 4 reach 6 patches back, and a question is at least 9 after its pair. Arms differ in
the memory and its plasticity alone. All learn from rows of 2 pairs first, then of 4 with gaps of 8
to 24 patches, and are also scored on longer ones. (From rows of 8 at once, a model of this size had
not begun to learn after 300 steps.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY
from tests.benchmarks.timing import Table
from tests.evidence.recall import score
from tests.evidence.training import IGNORED, Batch, future_leak, over_seeds, train

KEYS, VALUES, FILLERS, PATCH = 32, 16, 16, 4
VOCAB = KEYS + VALUES + FILLERS
PAIRS, TEST_GAPS = 4, (16, 64, 256)  # in patches
ROWS, LR, TEST_SEED, TEST_ROWS = 64, 4e-3, 10_000, 128

ARMS: dict[str, dict[str, Any]] = {
    "plasticity 1": {},
    "plasticity 0.99": {"plasticity": 0.99},
    "no memory": {"memory": "none"},
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 2,
    "window_size": 4,
    "head_hidden": 64,
    "thinking_steps": 1,
    "init_std": 0.1,  # 0.02 suits widths of a thousand
}


class Stage(NamedTuple):
    """`gaps`: the least and the most patches between the last pair and the first question."""

    pairs: int
    gaps: tuple[int, int]
    steps: int


STAGES = (Stage(2, (8, 8), 300), Stage(PAIRS, (8, 24), 300))


class Result(NamedTuple):
    """By gap: share of right answers and nats per answer. The largest future leak."""

    recall: dict[int, float]
    loss: dict[int, float]
    leak: float


def draw(pairs: int, gap: int, rows: int, generator: torch.Generator) -> Batch:
    """Random rows; only the values that follow a repeated key are scored."""
    units = 2 * pairs + gap
    size = (rows, PATCH * units + 1)
    stream = torch.randint(KEYS + VALUES, VOCAB, size, generator=generator)
    keys = torch.rand(rows, KEYS, generator=generator).argsort(dim=1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, keys.shape, generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)
    told = PATCH * torch.arange(pairs)
    asked = told + PATCH * (pairs + gap)
    stream[:, told], stream[:, told + 1] = keys, values
    stream[:, asked], stream[:, asked + 1] = keys.gather(1, order), values.gather(1, order)
    labels = torch.full((rows, PATCH * units), IGNORED)
    labels[:, asked] = values.gather(1, order)
    return Batch(stream[:, :-1], labels)


def batches(stages: tuple[Stage, ...], *, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for stage in stages:
        least, most = stage.gaps
        for _ in range(stage.steps):
            gap = int(torch.randint(least, most + 1, (), generator=generator))
            yield draw(stage.pairs, gap, ROWS, generator)


def run(
    arm: str, *, seed: int, stages: tuple[Stage, ...] = STAGES, rows: int = TEST_ROWS
) -> Result:
    """Train one arm and score it at every gap, on rows that it has not seen."""
    config = AgiformerConfig(**SHAPE | ARMS[arm])
    steps = sum(stage.steps for stage in stages)
    trained = train(FAMILY, config, batches(stages, seed=seed), steps=steps, lr=LR, seed=seed)
    recall, loss = {}, {}
    for gap in TEST_GAPS:
        test = draw(PAIRS, gap, rows, torch.Generator().manual_seed(TEST_SEED))
        recall[gap], loss[gap] = score(trained.model, test)
    sample = draw(PAIRS, TEST_GAPS[0], 2, torch.Generator().manual_seed(TEST_SEED)).tokens
    result = Result(recall, loss, future_leak(trained.model, sample, vocab_size=VOCAB))
    print(f"{arm}, seed {seed}: {result}", flush=True)
    return result


def tables(num_seeds: int) -> Iterator[Table]:
    """Recall of the arms by gap, over seeds."""
    rows = []
    for arm in ARMS:
        results = [run(arm, seed=seed) for seed in range(num_seeds)]
        rows.append(
            (
                arm,
                *(
                    over_seeds([100 * r.recall[gap] for r in results], digits=1)
                    for gap in TEST_GAPS
                ),
                over_seeds([r.loss[TEST_GAPS[0]] for r in results]),
                f"{max(r.leak for r in results):g}",
            )
        )
    gaps = [f"{PATCH * gap:,} bytes" for gap in TEST_GAPS]
    header = ("", *gaps, "nats per answer, nearest", "leak")
    yield Table(
        f"Recall % of {PAIRS} pairs after so many bytes; chance {100 / VALUES:.1f} %", header, rows
    )
