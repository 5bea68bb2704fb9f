"""Bytes in patches beside a byte-level llama, at equal FLOPs and on the same bytes.

The text, its parts and the batches are those of `language`. A patch lets a trunk work once for four
bytes, so at the same FLOPs a byte it is wider: every arm sees the same rows in the same order.
The learning rate and the spread of the first weights of each arm are the best of RATES and STDS in
a third as many steps. Bits are also given by the place of a byte in its patch: near 0 at the first
would mean that a latent sees what it predicts.
"""

from __future__ import annotations

import itertools
import lzma
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY as AGIFORMER
from models.base import TokenInputs
from tests.benchmarks.timing import Table
from tests.evidence.language import ARMS as OTHERS
from tests.evidence.language import LENGTH, ROWS, VOCAB, Arm, Corpus, batches, rows_at
from tests.evidence.training import Trained, future_leak, over_seeds, train

STEPS, SWEEP_SEED, TEST_ROWS = 120, 100, 128
RATES, STDS = (2e-3, 4e-3), (0.02, 0.1)
PATCH = 4
_SIZES = {
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
    "agiformer, causal head": Arm(AGIFORMER, AgiformerConfig(**_SIZES)),
    "agiformer, independent head": Arm(
        AGIFORMER, AgiformerConfig(**_SIZES, byte_head="independent")
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


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """Bits per byte of every arm over seeds, and of compressors on the whole held-out text."""
    corpus = Corpus.of_the_library()
    rows = []
    for name, arm in ARMS.items():
        start = best_start(name, corpus, steps=steps // 3)
        rows.append(_row(name, arm, corpus, start=start, num_seeds=num_seeds, steps=steps))
    places = [f"byte {place + 1}" for place in range(PATCH)]
    header = ("", "parameters", "MFLOP per byte", "lr", "std", "bits per byte", *places, "leak")
    title = f"Held-out text after {steps * ROWS * LENGTH:,} bytes, and by the place in a patch"
    yield Table(title, header, rows)
    train_text, text = (bytes(part.numpy()) for part in (corpus.train, corpus.test))
    yield Table(
        f"Without a network, all {len(text):,} held-out bytes",
        ("", "bits per byte"),
        [
            ("frequencies of bytes", f"{order_zero_bits(corpus.train, corpus.test):.3f}"),
            ("xz -9", f"{compressed_bits(text):.3f}"),
            (
                f"xz -9 after {steps * ROWS * LENGTH:,} bytes of training text",
                f"{compressed_bits(text, after=train_text[: steps * ROWS * LENGTH]):.3f}",
            ),
        ],
    )


def _row(
    name: str, arm: Arm, corpus: Corpus, *, start: Start, num_seeds: int, steps: int
) -> tuple[str, ...]:
    fitted = [fit(arm, corpus, start=start, seed=seed, steps=steps) for seed in range(num_seeds)]
    scores = [score(trained, arm, corpus.test) for trained in fitted]
    print(f"{name}: {scores}", flush=True)
    sample = rows_at(corpus.test, torch.tensor([0, 1000])).tokens
    leaks = [future_leak(trained.model, sample, vocab_size=VOCAB) for trained in fitted]
    return (
        name,
        f"{arm.family.num_parameters(arm.config):,}",
        f"{arm.family.flops(arm.config, LENGTH) / 1e6:.2f}",
        f"{start.lr:g}",
        f"{start.std:g}",
        over_seeds([s.bits for s in scores]),
        *(over_seeds([s.by_place[k] for s in scores]) for k in range(PATCH)),
        f"{max(leaks):g}",
    )
