"""Recall over several hops: does memory across layers save the steps that a dense model computes?

A row names a random map f of 8 nodes, a token per pair (x, f(x)) in random order, and then asks
for f, f(f(.)), ... of every node, a token per question (hops, x), in random order. The answer is
no token of the row, so that no question answers another. Chance is 1 of 8; `most frequent value`
is the share that a model gets which counts how often a value occurs and looks nothing up.

Every arm spends the same forward FLOPs per token, by the size of its FFN, on the same rows in as
many steps; dense arms with four layers and with five.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.model import FAMILY as AMRPA
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from tests.benchmarks.timing import Table
from tests.evidence.language import Arm
from tests.evidence.training import (
    IGNORED,
    Batch,
    future_leak,
    logits_of,
    over_seeds,
    train,
    with_flops,
)

NODES, HOPS = 8, 3
FACTS = NODES * NODES
VOCAB = FACTS + HOPS * NODES
LENGTH = NODES + HOPS * NODES
STEPS, ROWS, LR = 500, 32, 4e-3
TEST_SEED, TEST_ROWS = 10_000, 512
FFN = 128  # of the arm that decides the FLOPs of all, the memory of kind qk

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "max_position_embeddings": LENGTH,
    "init_std": 0.1,  # 0.02 suits widths of a thousand; here it takes far longer
}
_MEMORY: dict[str, Any] = {"target_layers": "all", "alpha_mlp_hidden": 32}
_FLOPS = AMRPA.flops(AMRPALlamaConfig(**_SHAPE, **_MEMORY, intermediate_size=FFN), LENGTH)


def _arm(**changes: Any) -> Arm:
    memory = bool(changes.keys() & _MEMORY.keys())
    family, config_cls = (AMRPA, AMRPALlamaConfig) if memory else (LLAMA, LlamaConfig)
    return Arm(family, with_flops(config_cls, _SHAPE | changes, family, _FLOPS, length=LENGTH))


ARMS = {
    "dense, 4 layers": _arm(),
    "dense, 5 layers": _arm(num_layers=5),
    "memory, qk": _arm(**_MEMORY),
    "memory, qk, gradients through it": _arm(**_MEMORY, detach_history=False),
    "memory, context": _arm(**_MEMORY, history_kind="context"),
}


def draw(rows: int, generator: torch.Generator) -> Batch:
    """Random rows; only the questions are scored, by the number of the node they lead to."""
    values = torch.randint(NODES, (rows, NODES), generator=generator)
    reached = [values]
    for _ in range(HOPS - 1):
        reached.append(values.gather(1, reached[-1]))
    facts = torch.arange(NODES) * NODES + values
    questions = torch.arange(HOPS * NODES).expand(rows, -1)
    order = torch.rand(questions.shape, generator=generator).argsort(dim=1)
    told = facts.gather(1, torch.rand(facts.shape, generator=generator).argsort(dim=1))
    answers = torch.cat(reached, dim=1).gather(1, order)
    tokens = torch.cat((told, FACTS + questions.gather(1, order)), dim=1)
    return Batch(tokens, torch.cat((torch.full_like(told, IGNORED), answers), dim=1))


def batches(rows: int, *, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(rows, generator)


class Result(NamedTuple):
    """The share of right answers by hops, nats per answer, the largest future leak."""

    recall: list[float]
    loss: float
    leak: float


def run(
    name: str, *, seed: int, steps: int = STEPS, rows: int = ROWS, test_rows: int = TEST_ROWS
) -> Result:
    """Train one arm and score it on rows that it has not seen."""
    arm = ARMS[name]
    source = batches(rows, seed=seed)
    model = train(arm.family, arm.config, source, steps=steps, lr=LR, seed=seed).model
    test = draw(test_rows, torch.Generator().manual_seed(TEST_SEED))
    logits = logits_of(model, test.tokens).transpose(0, 1)[:, NODES:]
    answers, hops = test.labels[:, NODES:], (test.tokens[:, NODES:] - FACTS) // NODES
    right = logits.argmax(dim=-1) == answers
    result = Result(
        recall=[float(right[hops == hop].float().mean()) for hop in range(HOPS)],
        loss=float(cross_entropy(logits.flatten(0, 1), answers.flatten())),
        leak=future_leak(model, test.tokens[:2], vocab_size=VOCAB),
    )
    print(f"{name}, seed {seed}: {result}", flush=True)
    return result


def most_frequent_value(rows: int = 4096) -> list[float]:
    """The share of right answers by hops of the value that most nodes have."""
    values = torch.randint(NODES, (rows, NODES), generator=torch.Generator().manual_seed(0))
    guess, reached, shares = values.mode(dim=1).values.unsqueeze(1), values, []
    for _ in range(HOPS):
        shares.append(float((reached == guess).float().mean()))
        reached = values.gather(1, reached)
    return shares


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """The arms over seeds, beside the most frequent value."""
    header = (
        "", "parameters", "kFLOP per token", "1 hop, %",
        *(f"{hop} hops, %" for hop in range(2, HOPS + 1)), "nats per answer", "leak",
    )  # fmt: skip
    guesses = (f"{100 * share:.1f}" for share in most_frequent_value())
    rows = [("most frequent value", "-", "-", *guesses, "-", "-")]
    for name, arm in ARMS.items():
        results = [run(name, seed=seed, steps=steps) for seed in range(num_seeds)]
        by_hops = zip(*(result.recall for result in results), strict=True)
        rows.append(
            (
                name,
                f"{arm.family.num_parameters(arm.config):,}",
                f"{arm.family.flops(arm.config, LENGTH) / 1e3:.0f}",
                *(over_seeds([100 * share for share in shares], digits=1) for shares in by_hops),
                over_seeds([result.loss for result in results]),
                f"{max(result.leak for result in results):g}",
            )
        )
    yield Table(f"Right answers after {steps} steps of {ROWS} rows", header, rows)
