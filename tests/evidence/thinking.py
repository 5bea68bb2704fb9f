"""Adaptive computation: do steps go where they help, and does stopping save what it promises?

A row is a chain of questions and answers, a patch each. A question holds two digits in base 16 and
its kind. An `easy` answer repeats the first digit four times; a `hard` one holds sum, difference,
product and exclusive or of both, modulo 16; `noise` is random, which no thinking predicts. Only
answers are scored. One block and up to four thinking steps, each of which costs `PONDER_WEIGHT`.

Steps are those of held-out answers. Times are CPU seconds of the reasoning block as generation runs
it, where patches that have halted are left out, over those of the same block with every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.agiformer.cache import ReasoningCache
from models.agiformer.carry import AgiformerCarry
from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY
from models.agiformer.reasoning import RecurrentReasoningBlock
from models.base import TokenInputs
from parallel.carry import SequentialModel
from tests.benchmarks.timing import Table, interleaved
from tests.evidence.training import IGNORED, Batch, future_leak, logits_of, over_seeds, train

BASE, PATCH, PAIRS = 16, 4, 16
KINDS = ("easy", "hard", "noise")
VOCAB = BASE + len(KINDS) + 1  # digits, kinds, and what begins a row and fills up a question
FILL = VOCAB - 1
PONDER_WEIGHTS = (1e-3, 1e-2)
STEPS, ROWS, LR, TEST_SEED, TEST_ROWS, ROUNDS = 200, 32, 4e-3, 10_000, 64, 15
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 1,
    "num_heads": 2,
    "window_size": 4,
    "head_hidden": 64,
    "thinking_steps": 4,
    "init_std": 0.1,
}


class Questions(NamedTuple):
    """`batch` of rows, and the kind of every answer int64 [b, PAIRS]."""

    batch: Batch
    kinds: Tensor


class Result(NamedTuple):
    """By kind: nats per scored byte, mean steps, and time of the block over that with every step.
    The largest future leak."""

    nats: dict[str, float]
    steps: dict[str, float]
    time: dict[str, float]
    leak: float


def draw(rows: int, generator: torch.Generator) -> Questions:
    """Random rows; latent i sees all of patch i - 1 and predicts patch i."""
    kinds = torch.randint(len(KINDS), (rows, PAIRS), generator=generator)
    a, b = torch.randint(BASE, (2, rows, PAIRS), generator=generator)
    easy = torch.stack((a, a, a, a), dim=-1)
    hard = torch.stack((a + b, a - b, a * b, a ^ b), dim=-1) % BASE
    noise = torch.randint(BASE, easy.shape, generator=generator)
    kind = kinds.unsqueeze(-1)
    answer = easy.where(kind == 0, hard.where(kind == 1, noise))
    question = torch.stack((a, b, BASE + kinds, torch.full_like(a, FILL)), dim=-1)
    text = torch.stack((question, answer), dim=2).flatten(1)
    scored = torch.stack((torch.full_like(answer, IGNORED), answer), dim=2).flatten(1)
    tokens = torch.cat((torch.full((rows, 1), FILL), text[:, :-1]), dim=1)
    return Questions(Batch(tokens, scored), kinds)


def batches(*, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(ROWS, generator).batch


def run(weight: float, *, seed: int, steps: int = STEPS, rows: int = TEST_ROWS) -> Result:
    """Train with one weight of the ponder cost, and look at held-out answers."""
    config = AgiformerConfig(**SHAPE, ponder_loss_weight=weight)
    model = train(FAMILY, config, batches(seed=seed), steps=steps, lr=LR, seed=seed).model
    batch, kinds = draw(rows, torch.Generator().manual_seed(TEST_SEED))
    states = _states(model, batch.tokens)
    taken = _steps_taken(model, states).T[:, 1::2]
    logits = logits_of(model, batch.tokens).transpose(0, 1)
    answers = [x.unflatten(1, (-1, 2, PATCH))[:, :, 1] for x in (logits, batch.labels)]
    nats, mean_steps, times = {}, {}, {}
    for number, kind in enumerate(KINDS):
        own = kinds == number
        nats[kind] = float(cross_entropy(answers[0][own].flatten(0, 1), answers[1][own].flatten()))
        mean_steps[kind] = float(taken[own].mean())
        times[kind] = _time_share(model, states[1::2].transpose(0, 1)[own])
    leak = future_leak(model, batch.tokens[:2], vocab_size=VOCAB)
    result = Result(nats, mean_steps, times, leak)
    print(f"ponder weight {weight:g}, seed {seed}: {result}", flush=True)
    return result


def _reasoning(model: SequentialModel) -> RecurrentReasoningBlock:
    return next(m for m in model.modules() if isinstance(m, RecurrentReasoningBlock))


@torch.no_grad()
def _states(model: SequentialModel, tokens: Tensor) -> Tensor:
    """What the reasoning block is given: [p, b, h]."""
    seen: list[Tensor] = []
    hook = _reasoning(model).register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].hidden)
    )
    model(TokenInputs(tokens))
    hook.remove()
    return seen[0]


@torch.no_grad()
def _steps_taken(model: SequentialModel, states: Tensor) -> Tensor:
    """How many steps each patch takes: [p, b]."""
    block = _reasoning(model)
    return block._weighted_steps(block.norm(states))[1].steps


@torch.inference_mode()
def _time_share(model: SequentialModel, states: Tensor) -> float:
    """Median CPU time of the block with early exit over that with every step: states [n, h]."""
    block, empty = _reasoning(model), torch.zeros(1, 3)
    carry = AgiformerCarry(states.unsqueeze(1), empty, empty.long())
    seconds = interleaved(
        {"stops": lambda: block(carry, ReasoningCache()), "all": lambda: block(carry)},
        rounds=ROUNDS,
        warmup=2,
        clock=time.process_time,
    )
    return median(a / b for a, b in zip(seconds["stops"], seconds["all"], strict=True))


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """Loss, steps and time of every kind, for every weight of the ponder cost."""
    rows = []
    for weight in PONDER_WEIGHTS:
        results = [run(weight, seed=seed, steps=steps) for seed in range(num_seeds)]
        for kind in KINDS:
            rows.append(
                (
                    f"{weight:g}, {kind}",
                    over_seeds([r.nats[kind] for r in results]),
                    over_seeds([r.steps[kind] for r in results], digits=2),
                    over_seeds([r.time[kind] for r in results], digits=2),
                    f"{max(r.leak for r in results):g}",
                )
            )
    header = ("ponder weight, kind", "nats per byte", "steps of 4", "time / all steps", "leak")
    yield Table("Thinking by kind of answer, means over seeds", header, rows)
