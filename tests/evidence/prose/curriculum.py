"""The published curriculum against the same bytes without it, and without its plasticity.

Dictionary, prose and encyclopaedia are Turkish (`fetch.py`, `--text FOLDER`); the place of the
stories is taken by speeches, the only connected prose in Turkish that public packages have. Stages
and their plasticity are the family's own (models.agiformer.standalone.settings), and are set
between steps as a run sets them. Every arm has the same model, steps and FLOPs and, seed by seed,
the same rows: the mixed ones in random order. The arm with the order of the stages at constant
plasticity tells apart what the order does and what plasticity does.

Two documents of 20 of each source are held out and scored; `all`: their bits weighted by the shares
of training. A row is as long as in configs/agiformer_curriculum.yaml. Learning rate and first
weights are those that `patches` chose for this model, alike for all arms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY
from models.agiformer.standalone.settings import CURRICULUM
from models.base import TokenInputs
from tests.benchmarks.timing import Table
from tests.evidence.language import VOCAB, Corpus, rows_at
from tests.evidence.patches import SIZES
from tests.evidence.training import Batch, Trained, future_leak, over_seeds, train

STEPS, ROWS, LENGTH, LR, TEST_ROWS = 120, 2, 1024, 4e-3, 32
FOLDERS = {"dictionary": "dictionary", "stories": "turkish", "wiki": "wiki"}
CONFIG = AgiformerConfig(**SIZES, init_std=0.1)


class Arm(NamedTuple):
    """`plasticity`: of all steps, or that of the stages."""

    ordered: bool
    plasticity: float | None


ARMS = {
    "curriculum": Arm(ordered=True, plasticity=None),
    "ordered, plasticity 0.99": Arm(ordered=True, plasticity=0.99),
    "mixed, plasticity 0.99": Arm(ordered=False, plasticity=0.99),
    "mixed, plasticity 1": Arm(ordered=False, plasticity=1.0),
}


class Result(NamedTuple):
    """Bits per byte by source; the largest future leak."""

    bits: dict[str, float]
    leak: float

    @property
    def all(self) -> float:
        """Weighted by the shares of training."""
        return sum(share * self.bits[name] for name, share in shares().items())


def shares() -> dict[str, float]:
    """The share of the steps of every source."""
    ends = pairwise((0.0, *(stage.until for stage in CURRICULUM)))
    return {stage.source: end - begin for stage, (begin, end) in zip(CURRICULUM, ends, strict=True)}


def first_steps(steps: int) -> list[int]:
    """Of the stages, and the end."""
    return [0, *(round(stage.until * steps) for stage in CURRICULUM)]


def batches(texts: Mapping[str, Tensor], *, ordered: bool, seed: int, steps: int) -> list[Batch]:
    """Batches of the stages in their order, or the same rows in random order."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for stage, (begin, end) in zip(CURRICULUM, pairwise(first_steps(steps)), strict=True):
        text = texts[stage.source]
        size = ((end - begin) * ROWS,)
        starts = torch.randint(len(text) - LENGTH, size, generator=generator)
        parts.append(rows_at(text, starts, length=LENGTH))
    tokens, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    if not ordered:
        order = torch.randperm(len(tokens), generator=generator)
        tokens, labels = tokens[order], labels[order]
    return [Batch(*pair) for pair in zip(tokens.split(ROWS), labels.split(ROWS), strict=True)]


@torch.no_grad()
def bits_per_byte(trained: Trained, text: Tensor, *, rows: int = TEST_ROWS) -> float:
    """Cross entropy over rows that are spread evenly over the text."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, rows).long()
    total = 0.0
    for part in starts.split(4):
        batch = rows_at(text, part, length=LENGTH)
        output = trained.model(TokenInputs(batch.tokens))
        total += float(FAMILY.token_losses(output, batch.labels, trained.model.ctx).sum())
    return total / (rows * LENGTH * math.log(2))


def run(
    name: str, corpora: Mapping[str, Corpus], *, seed: int, steps: int, rows: int = TEST_ROWS
) -> Result:
    """Train one arm and score it on what is held out of every source."""
    arm = ARMS[name]
    texts = {source: corpus.train for source, corpus in corpora.items()}
    source = batches(texts, ordered=arm.ordered, seed=seed, steps=steps)
    changes = {
        first: {"plasticity": arm.plasticity or stage.plasticity}
        for stage, first in zip(CURRICULUM, first_steps(steps)[:-1], strict=True)
    }
    trained = train(FAMILY, CONFIG, iter(source), steps=steps, lr=LR, seed=seed, changes=changes)
    bits, held_out = {}, {}
    for key, corpus in corpora.items():
        held_out[key] = torch.cat((corpus.test, corpus.tuning))
        bits[key] = bits_per_byte(trained, held_out[key], rows=rows)
    sample = rows_at(held_out["wiki"], torch.tensor([0, 1000])).tokens
    result = Result(bits, future_leak(trained.model, sample, vocab_size=VOCAB))
    print(f"{name}, seed {seed}: {result}", flush=True)
    return result


def tables(num_seeds: int, *, text: Path, steps: int = STEPS) -> list[Table]:
    """Bits per byte of every arm and source, and how far from the curriculum."""
    corpora = {name: Corpus.of_folder(text / folder) for name, folder in FOLDERS.items()}
    return [compared(corpora, num_seeds, steps=steps)]


def compared(
    corpora: Mapping[str, Corpus], num_seeds: int, *, steps: int, rows: int = TEST_ROWS
) -> Table:
    results = {
        name: [run(name, corpora, seed=s, steps=steps, rows=rows) for s in range(num_seeds)]
        for name in ARMS
    }
    lines = []
    for name, own in results.items():
        pairs = list(zip(own, results["curriculum"], strict=True))
        lines.append(
            (
                name,
                *(over_seeds([r.bits[source] for r in own]) for source in corpora),
                over_seeds([r.all for r in own]),
                over_seeds([ours.bits["wiki"] - theirs.bits["wiki"] for ours, theirs in pairs]),
                over_seeds([ours.all - theirs.all for ours, theirs in pairs]),
                f"{max(r.leak for r in own):g}",
            )
        )
    header = ("bits per byte", *corpora, "all", "wiki beside curriculum", "all beside", "leak")
    return Table(f"Held-out text after {steps * ROWS * LENGTH:,} bytes", header, lines)
