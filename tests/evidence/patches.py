"""Bytes in patches beside a byte-level llama, at equal FLOPs and on the same bytes, and at equal
time.

The text, its parts and the batches are those of `language`, or with `--text` the files of a folder,
each of which is a document. A patch lets a trunk work once for four bytes, so at the same FLOPs a
byte it is wider: every arm sees the same rows in the same order. The learning rate and the spread
of the first weights of each arm are the best of RATES and STDS in a third as many steps. Bits are
also given by the place of a byte in its patch: near 0 at the first would mean that a latent sees
what it predicts.

At equal time an arm takes as many steps as fit into llama's CPU seconds: steps of all arms are
timed in turn before, and the seconds that each training then took are printed beside.
"""

from __future__ import annotations

import itertools
import lzma
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY as AGIFORMER
from models.base import TokenInputs
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.benchmarks.timing import Table, interleaved
from tests.evidence.language import ARMS as OTHERS
from tests.evidence.language import LENGTH, ROWS, VOCAB, Arm, Corpus, batches, rows_at
from tests.evidence.training import (
    Trained,
    future_leak,
    optimizer_of,
    over_seeds,
    train,
    train_step,
)

STEPS, SWEEP_SEED, TEST_ROWS, ROUNDS = 120, 100, 128, 20
RATES, STDS = (2e-3, 4e-3), (0.02, 0.1)
PATCH, REFERENCE = 4, "llama"
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 192,  # as many FLOPs per byte as llama's 128
    "intermediate_size": 576,
    "num_layers": 4,
    "num_heads": 4,
    "window_size": 32,
    "byte_dim": 64,
    "head_hidden": 128,
}
ARMS = {
    "llama": OTHERS["llama"],
    "agiformer, causal head": Arm(AGIFORMER, AgiformerConfig(**SIZES)),
    "agiformer, independent head": Arm(
        AGIFORMER, AgiformerConfig(**SIZES, byte_head="independent")
    ),
}


class Start(NamedTuple):
    """Learning rate and the standard deviation of the first weights."""

    lr: float
    std: float


class Score(NamedTuple):
    """Bits per byte of all scored bytes, and of those at each place of a patch."""

    bits: float
    by_place: list[float]


class Run(NamedTuple):
    """One seed of an arm; `seconds`: CPU time of the training."""

    score: Score
    leak: float
    seconds: float


def fit(arm: Arm, corpus: Corpus, *, start: Start, seed: int, steps: int) -> Trained:
    source = batches(corpus.train, seed=seed)
    config = arm.config.model_copy(update={"init_std": start.std})
    return train(arm.family, config, source, steps=steps, lr=start.lr, seed=seed)


@torch.no_grad()
def score(trained: Trained, arm: Arm, text: Tensor, *, rows: int = TEST_ROWS) -> Score:
    """Cross entropy over rows that are spread evenly over the text, all places equally often."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, rows).long()
    sums = torch.zeros(PATCH, dtype=torch.float64)
    for part in starts.split(16):
        batch = rows_at(text, part)
        output = trained.model(TokenInputs(batch.tokens))
        nats = arm.family.token_losses(output, batch.labels, trained.model.ctx)
        sums += nats.double().sum(dim=1).unflatten(0, (-1, PATCH)).sum(dim=0)
    bits = sums / (rows * LENGTH / PATCH * math.log(2))
    return Score(float(bits.mean()), bits.tolist())


def best_start(name: str, corpus: Corpus, *, steps: int) -> Start:
    """What does best on the text for tuning, with a seed of its own."""
    bits = {}
    for start in map(Start._make, itertools.product(RATES, STDS)):
        trained = fit(ARMS[name], corpus, start=start, seed=SWEEP_SEED, steps=steps)
        bits[start] = score(trained, ARMS[name], corpus.tuning, rows=64).bits
    print(f"{name}: {bits}", flush=True)
    return min(bits, key=bits.__getitem__)


def compressed_bits(text: bytes, *, after: bytes = b"") -> float:
    """Bits per byte of `xz -9`; with `after`, what the text adds to the archive of both."""
    sizes = [len(lzma.compress(whole, preset=9)) for whole in (after + text, after) if whole]
    return 8 * (sizes[0] - sum(sizes[1:])) / len(text)


def order_zero_bits(train_text: Tensor, text: Tensor) -> float:
    """Bits per byte by the frequencies of bytes in the training text."""
    counts = torch.bincount(train_text.long(), minlength=VOCAB).double() + 1.0
    return float(-(counts / counts.sum()).log2()[text.long()].mean())


def seconds_per_step(corpus: Corpus, *, rounds: int = ROUNDS) -> dict[str, float]:
    """CPU seconds of a training step of every arm, taken in turn: medians."""
    batch = next(batches(corpus.train, seed=SWEEP_SEED))
    calls = {}
    for name, (family, config) in ARMS.items():
        model = SequentialModel(family.layer_specs(config), ParallelContext.single()).train()
        optimizer = optimizer_of(model, lr=1e-4)
        calls[name] = partial(train_step, family, config, model, optimizer, batch)
    seconds = interleaved(calls, rounds=rounds, warmup=1, clock=time.process_time)
    return {name: statistics.median(values) for name, values in seconds.items()}


def equal_time_steps(per_step: Mapping[str, float], steps: int) -> dict[str, int]:
    """Of every arm: as many as take the time of `steps` of the reference."""
    return {name: round(steps * per_step[REFERENCE] / own) for name, own in per_step.items()}


def run(
    name: str, corpus: Corpus, *, start: Start, seed: int, steps: int, rows: int = TEST_ROWS
) -> Run:
    """Train an arm and score it on the held-out text."""
    arm = ARMS[name]
    begin = time.process_time()
    trained = fit(arm, corpus, start=start, seed=seed, steps=steps)
    seconds = time.process_time() - begin
    sample = rows_at(corpus.test, torch.tensor([0, 1000])).tokens
    leak = future_leak(trained.model, sample, vocab_size=VOCAB)
    result = Run(score(trained, arm, corpus.test, rows=rows), leak, seconds)
    print(f"{name}, {steps} steps, seed {seed}: {result}", flush=True)
    return result


def tables(num_seeds: int, *, steps: int = STEPS, text: Path | None = None) -> Iterator[Table]:
    """Bits per byte of every arm at equal FLOPs and at equal time, and of compressors."""
    corpus = Corpus.of_the_library() if text is None else Corpus.of_folder(text)
    starts = {name: best_start(name, corpus, steps=steps // 3) for name in ARMS}

    def runs(name: str, own: int) -> list[Run]:
        return [
            run(name, corpus, start=starts[name], seed=seed, steps=own) for seed in range(num_seeds)
        ]

    per_step = seconds_per_step(corpus)
    equal_bytes = {name: runs(name, steps) for name in ARMS}
    yield _equal_bytes(equal_bytes, starts, steps)
    own = equal_time_steps(per_step, steps)
    others = {name: runs(name, own[name]) for name in ARMS if name != REFERENCE}
    equal_time = {REFERENCE: equal_bytes[REFERENCE]} | others
    yield _equal_time(equal_time, per_step, own)
    train_text, test_text = (bytes(part.numpy()) for part in (corpus.train, corpus.test))
    yield Table(
        f"Without a network, all {len(test_text):,} held-out bytes",
        ("", "bits per byte"),
        [
            ("frequencies of bytes", f"{order_zero_bits(corpus.train, corpus.test):.3f}"),
            ("xz -9", f"{compressed_bits(test_text):.3f}"),
            (
                f"xz -9 after {steps * ROWS * LENGTH:,} bytes of training text",
                f"{compressed_bits(test_text, after=train_text[: steps * ROWS * LENGTH]):.3f}",
            ),
        ],
    )


def _equal_bytes(runs: Mapping[str, list[Run]], starts: Mapping[str, Start], steps: int) -> Table:
    rows = []
    for name, own in runs.items():
        family, config = ARMS[name]
        rows.append(
            (
                name,
                f"{family.num_parameters(config):,}",
                f"{family.flops(config, LENGTH) / 1e6:.2f}",
                f"{starts[name].lr:g}",
                f"{starts[name].std:g}",
                over_seeds([r.score.bits for r in own]),
                *(over_seeds([r.score.by_place[k] for r in own]) for k in range(PATCH)),
                f"{max(r.leak for r in own):g}",
            )
        )
    places = [f"byte {place + 1}" for place in range(PATCH)]
    header = ("", "parameters", "MFLOP per byte", "lr", "std", "bits per byte", *places, "leak")
    title = f"Held-out text after {steps * ROWS * LENGTH:,} bytes, and by the place in a patch"
    return Table(title, header, rows)


def _equal_time(
    runs: Mapping[str, list[Run]], per_step: Mapping[str, float], steps: Mapping[str, int]
) -> Table:
    rows = []
    for name, own in runs.items():
        bits = [r.score.bits for r in own]
        beside = [b - r.score.bits for b, r in zip(bits, runs[REFERENCE], strict=True)]
        rows.append(
            (
                name,
                f"{1e3 * per_step[name]:.0f}",
                f"{steps[name]}",
                f"{steps[name] * ROWS * LENGTH:,}",
                over_seeds([r.seconds for r in own], digits=1),
                over_seeds(bits),
                over_seeds(beside),
                f"{max(r.leak for r in own):g}",
            )
        )
    header = ("", "CPU ms a step", "steps", "bytes", "CPU s of training", "bits per byte",
              f"beside {REFERENCE}", "leak")  # fmt: skip
    return Table("Held-out text after equal CPU time", header, rows)
