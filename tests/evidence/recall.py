"""Recall from beyond the attention window: what the memory path and the long path add to a window.

A row of 512 tokens names 16 pairs of a key and a value, among fillers, and later shows each key
again: what comes next is its value. The pair stands 129 to 447 tokens before its question, the
window is 32 tokens, and nothing else tells the value, so that chance is 1 of 32. All arms have the
same number of parameters, by the size of the FFN, and the same curriculum: short rows of 4 pairs,
then of 16 (both farther back than the window), then full ones. They are scored on full ones alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.base import TokenInputs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY
from models.daria_former.paths import MemoryPath
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.benchmarks.timing import Table
from tests.evidence.training import (
    IGNORED,
    NO_AUX,
    NO_NOISE,
    Batch,
    future_leak,
    logits_of,
    over_seeds,
    train,
    with_parameters,
)

KEYS, VALUES, FILLERS, PAIRS = 64, 32, 32, 16
VOCAB = KEYS + VALUES + FILLERS
# Pairs of full rows begin at least 4 tokens after one another, anywhere: a stride never holds two
# values, and may cut a pair in two.
SLACK = 5

ARMS: dict[str, dict[str, Any]] = {
    "local + memory": {"paths": ("local", "memory")},
    "local + long": {"paths": ("local", "long")},
    "local": {"paths": ("local",)},
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_dim": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 8192,
    "sliding_window_size": 32,
    "num_global_tokens": 4,
    "working_memory_slots": 128,
    "episodic_memory_slots": 8,
    "persistent_memory_slots": 4,
    "segment_len": 32,
    "episodic_stride": 32,
    "memory_top_k": 32,
    "emotion_dim": 8,
    "esv_sites": 1,
    "rhythm_rank": 16,
    "initializer_range": 0.1,  # 0.02 suits widths of a thousand; here it takes far longer
    **NO_AUX,
    **NO_NOISE,
}
PARAMETERS = 400_000
LR, TEST_SEED, TEST_ROWS = 4e-3, 10_000, 128
OTHER_TOP_K = (128, 16, 8, 4)


class Layout(NamedTuple):
    """Where a row of `length` tokens holds pairs and from where on it asks, one per `cell`."""

    length: int
    pairs: tuple[int, int]
    first_question: int
    cell: int
    num_pairs: int


class Stage(NamedTuple):
    layout: Layout
    steps: int
    rows: int


FULL = Layout(512, (64, 256), 384, 8, PAIRS)
SHORT = Layout(96, (0, 32), 64, 8, 4)
MIDDLE = Layout(192, (0, 64), 128, 4, PAIRS)
STAGES = (Stage(SHORT, 210, 32), Stage(MIDDLE, 130, 16), Stage(FULL, 180, 8))


def draw(layout: Layout, rows: int, generator: torch.Generator) -> Batch:
    """Random rows; only the tokens after a repeated key are scored."""
    size = (rows, layout.length + 1)
    stream = torch.randint(KEYS + VALUES, VOCAB, size, generator=generator)
    labels = torch.full((rows, layout.length), IGNORED)
    row = torch.arange(rows).unsqueeze(1)
    keys = torch.rand(rows, KEYS, generator=generator).argsort(dim=1)[:, : layout.num_pairs]
    values = KEYS + torch.randint(VALUES, keys.shape, generator=generator)
    asked = _places(layout.first_question, layout.length, layout, rows, generator)
    for places in (_places(*layout.pairs, layout, rows, generator), asked):
        stream[row, places], stream[row, places + 1] = keys, values
    labels[row, asked] = values
    return Batch(stream[:, :-1], labels)


def _places(start: int, stop: int, layout: Layout, rows: int, generator: torch.Generator) -> Tensor:
    """Where in [start, stop) each pair stands, each in a cell of its own: [rows, PAIRS]."""
    num_cells = (stop - start) // layout.cell
    cells = torch.rand(rows, num_cells, generator=generator).argsort(dim=1)[:, : layout.num_pairs]
    offsets = torch.randint(min(SLACK, layout.cell - 1), cells.shape, generator=generator)
    return start + cells * layout.cell + offsets


def batches(stages: tuple[Stage, ...], *, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for stage in stages:
        for _ in range(stage.steps):
            yield draw(stage.layout, stage.rows, generator)


class Result(NamedTuple):
    """Share of right answers, nats per answer, largest future leak, mean gate of the far path, and
    for the memory path the share of right answers when it retrieves more or fewer slots than in
    training (of the at most 108 that there are).
    """

    recall: float
    loss: float
    leak: float
    gate: float
    by_top_k: dict[int, float]


def config_of(arm: str) -> DariaFormerConfig:
    """The configuration of an arm, as large as the others."""
    return with_parameters(DariaFormerConfig, SHAPE | ARMS[arm], FAMILY, PARAMETERS)


def run(
    arm: str, *, seed: int, stages: tuple[Stage, ...] = STAGES, rows: int = TEST_ROWS
) -> Result:
    """Train one arm and score it on rows of FULL that it has not seen."""
    config = config_of(arm)
    steps = sum(stage.steps for stage in stages)
    trained = train(FAMILY, config, batches(stages, seed=seed), steps=steps, lr=LR, seed=seed)
    test = draw(FULL, rows, torch.Generator().manual_seed(TEST_SEED))
    recall, loss = score(trained.model, test)
    result = Result(
        recall=recall,
        loss=loss,
        leak=future_leak(trained.model, test.tokens[:2], vocab_size=VOCAB),
        gate=trained.terms["gate_memory"] + trained.terms["gate_long"],
        by_top_k=_by_top_k(trained.model, test) if config.has("memory") else {},
    )
    print(f"{arm}, seed {seed}: {result}", flush=True)
    return result


def score(model: SequentialModel, test: Batch) -> tuple[float, float]:
    """Share of right answers, and nats per answer."""
    logits = torch.cat([logits_of(model, tokens) for tokens in test.tokens.split(16)], dim=1)
    scored = test.labels.T != IGNORED
    chosen, answers = logits[scored], test.labels.T[scored]
    right = chosen.argmax(dim=-1) == answers
    return float(right.float().mean()), float(cross_entropy(chosen, answers))


def _by_top_k(model: SequentialModel, test: Batch) -> dict[int, float]:
    """Share of right answers when every block retrieves so many slots; the last one stays set."""
    found = {}
    for top_k in OTHER_TOP_K:
        for path in model.modules():
            if isinstance(path, MemoryPath):
                path.layout = path.layout._replace(top_k=top_k)
        found[top_k] = score(model, test)[0]
    return found


@torch.no_grad()
def cache_bytes(config: DariaFormerConfig, length: int) -> int:
    """What the blocks keep after `length` tokens of one row."""
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).eval()
    cache = model.new_cache(1, length)
    for chunk in torch.zeros(1, length, dtype=torch.long).split(512, dim=1):
        model(TokenInputs(chunk), cache)
    return sum(part.num_bytes for name, part in cache.items() if name.startswith("block"))


def tables(num_seeds: int) -> Iterator[Table]:
    """The arms over seeds, and what each keeps per token."""
    rows, fewer = [], []
    for arm in ARMS:
        results = [run(arm, seed=seed) for seed in range(num_seeds)]
        rows.append(
            (
                arm,
                f"{FAMILY.num_parameters(config_of(arm)):,}",
                over_seeds([100 * r.recall for r in results], digits=1),
                over_seeds([r.loss for r in results]),
                over_seeds([r.gate for r in results], digits=2),
                f"{max(r.leak for r in results):g}",
            )
        )
        if results[0].by_top_k:
            shares = ([100 * r.by_top_k[k] for r in results] for k in OTHER_TOP_K)
            fewer.append((arm, *(over_seeds(share, digits=1) for share in shares)))
    header = ("paths", "parameters", "recall %", "nats per answer", "gate of the far path", "leak")
    yield Table(
        f"Recall of pairs 129 to 447 tokens back, window 32; chance {100 / VALUES:.1f} %",
        header,
        rows,
    )
    yield Table(
        "Recall % of the same models when they retrieve other than 32 slots",
        ("paths", *(f"top {k}" for k in OTHER_TOP_K)),
        fewer,
    )
    yield _cache_table()


def _cache_table() -> Table:
    rows = []
    for arm in ARMS:
        sizes = [cache_bytes(config_of(arm), length) / length for length in (512, 8192)]
        rows.append((arm, *(f"{size:,.0f}" for size in sizes)))
    return Table("Cache, bytes per token of one row (fp32)", ("paths", "512", "8192"), rows)
