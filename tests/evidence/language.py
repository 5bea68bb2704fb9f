"""Byte language modelling beside a llama of the same width and depth, at equal FLOPs.

The text is the source of Python's standard library (the demo corpus): one module of 20 is scored,
another of 20 decides the learning rate of each family (in half as many steps), the rest is trained
on. Both families have the same optimizer and schedule; llama sees more tokens, by the ratio of
forward FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.demo_corpus import standard_library_modules
from models.base import ModelFamily, TokenInputs
from models.daria_former.config import PATHS, DariaFormerConfig
from models.daria_former.model import FAMILY as DARIA_FORMER
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from tests.benchmarks.timing import Table
from tests.evidence.training import NO_AUX, Batch, Trained, future_leak, over_seeds, train

VOCAB, LENGTH, ROWS, STEPS = 256, 256, 8, 200
RATES = (2e-3, 4e-3, 8e-3)
SWEEP_SEED, TEST_ROWS = 100, 256

DARIA = {
    "vocab_size": VOCAB,
    "hidden_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_dim": 384,
    "max_seq_len": LENGTH,
    "sliding_window_size": 64,
    "num_global_tokens": 8,
    "segment_len": 32,
    "episodic_stride": 32,
    "persistent_memory_slots": 16,
    "persona_memory_slots": 8,
    "persona_dim": 8,
    "memory_top_k": 16,
    "emotion_dim": 16,
    "rhythm_rank": 16,
}


class Arm(NamedTuple):
    family: ModelFamily
    config: Any


ARMS = {
    "llama": Arm(
        LLAMA,
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=384,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            max_position_embeddings=LENGTH,
            tie_embeddings=True,
        ),
    ),
    "daria_former": Arm(DARIA_FORMER, DariaFormerConfig(**DARIA)),
    "daria_former, cross entropy alone": Arm(DARIA_FORMER, DariaFormerConfig(**DARIA, **NO_AUX)),
}


class Corpus(NamedTuple):
    """Bytes uint8 [n] to train on, to choose the learning rate by, and to score."""

    train: Tensor
    tuning: Tensor
    test: Tensor

    @classmethod
    def of_the_library(cls) -> Corpus:
        return cls.of([module.text.encode() for module in standard_library_modules()])

    @classmethod
    def of_folder(cls, folder: Path) -> Corpus:
        """Every file of a folder is a document, in the order of their names."""
        return cls.of([path.read_bytes() for path in sorted(folder.iterdir())])

    @classmethod
    def of(cls, documents: Sequence[bytes]) -> Corpus:
        """One document of 20 is scored, another of 20 is for tuning."""
        parts = {"train": [], "tuning": [], "test": []}  # type: dict[str, list[bytes]]
        for number, text in enumerate(documents):
            parts[{0: "test", 10: "tuning"}.get(number % 20, "train")].append(text)
        joined = {name: bytearray(b"\n".join(texts)) for name, texts in parts.items()}
        return cls(**{k: torch.frombuffer(v, dtype=torch.uint8) for k, v in joined.items()})


def rows_at(text: Tensor, starts: Tensor, *, length: int = LENGTH) -> Batch:
    rows = text[starts.unsqueeze(1) + torch.arange(length + 1)].long()
    return Batch(rows[:, :-1], rows[:, 1:])


def batches(text: Tensor, *, seed: int) -> Iterator[Batch]:
    """Rows from random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield rows_at(text, torch.randint(len(text) - LENGTH, (ROWS,), generator=generator))


def steps_of(arm: Arm, steps: int, *, reference: Arm = ARMS["daria_former"]) -> int:
    """Number of steps that cost as many FLOPs as `steps` of the reference."""
    ratio = reference.family.flops(reference.config, LENGTH)
    return round(steps * ratio / arm.family.flops(arm.config, LENGTH))


def fit(arm: Arm, corpus: Corpus, *, lr: float, seed: int, steps: int) -> Trained:
    source = batches(corpus.train, seed=seed)
    return train(arm.family, arm.config, source, steps=steps, lr=lr, seed=seed)


@torch.no_grad()
def bits_per_byte(trained: Trained, arm: Arm, text: Tensor, *, rows: int = TEST_ROWS) -> float:
    """Cross entropy over `rows` rows that are spread evenly over the text."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, rows).long()
    total = 0.0
    for part in starts.split(16):
        batch = rows_at(text, part)
        output = trained.model(TokenInputs(batch.tokens))
        total += float(arm.family.token_losses(output, batch.labels, trained.model.ctx).sum())
    return total / (rows * LENGTH * math.log(2))


def best_rate(
    arm: Arm,
    corpus: Corpus,
    *,
    steps: int,
    rates: Sequence[float] = RATES,
    rows: int = TEST_ROWS,
) -> float:
    """The learning rate that does best on the text for tuning, with a seed of its own."""
    scores = {}
    for lr in rates:
        trained = fit(arm, corpus, lr=lr, seed=SWEEP_SEED, steps=steps)
        scores[lr] = bits_per_byte(trained, arm, corpus.tuning, rows=rows)
    print(f"learning rates, {arm.family.name}: {scores}", flush=True)
    return min(scores, key=scores.__getitem__)


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """Bits per byte of every arm over seeds, then the mean gates of the Daria-Former's."""
    corpus = Corpus.of_the_library()
    rates = {
        name: best_rate(ARMS[name], corpus, steps=steps_of(ARMS[name], steps // 2))
        for name in ("llama", "daria_former")
    }
    rows, gates = [], []
    for name, arm in ARMS.items():
        lr = rates[arm.family.name]
        own = steps_of(arm, steps)
        fitted = [fit(arm, corpus, lr=lr, seed=seed, steps=own) for seed in range(num_seeds)]
        scores = [bits_per_byte(trained, arm, corpus.test) for trained in fitted]
        print(f"{name}: {scores}", flush=True)
        sample = rows_at(corpus.test, torch.tensor([0, 1000])).tokens
        leaks = [future_leak(trained.model, sample, vocab_size=VOCAB) for trained in fitted]
        rows.append(
            (
                name,
                f"{arm.family.num_parameters(arm.config):,}",
                f"{arm.family.flops(arm.config, LENGTH) / 1e6:.2f}",
                f"{own * ROWS * LENGTH:,}",
                f"{lr:g}",
                over_seeds(scores),
                f"{max(leaks):g}",
            )
        )
        if arm.family is DARIA_FORMER:
            gates.append((name, *_mean_gates(fitted)))
    header = ("", "parameters", "MFLOP per byte", "bytes seen", "lr", "bits per byte", "leak")
    yield Table("Held-out text at equal FLOPs", header, rows)
    yield Table(
        "Mean gates in the last tenth of training",
        ("", *PATHS[:4], "variance of the emotion state"),
        gates,
    )


def _mean_gates(fitted: list[Trained]) -> list[str]:
    names = [*(f"gate_{path}" for path in PATHS[:4]), "emotion_variance"]
    return [over_seeds([trained.terms[name] for trained in fitted]) for name in names]
