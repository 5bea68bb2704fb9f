"""Adaptive computation: do steps go where they help, and does stopping save what it promises?

A row is a chain of questions and answers, a patch each; only answers are scored. One block and up
to four thinking steps, which a ponder weight makes dear. Two tasks:

* `digits`: a question holds two digits in base 16 and its kind. An `easy` answer repeats the first
  digit four times; a `hard` one holds sum, difference, product and exclusive or of both, modulo 16;
  `noise` is random, which no thinking predicts.
* `permutations`: a question holds one of 8 states and 1 to 4 of 8 permutations, and the answer is
  where they lead, one after the other: a known number of look-ups, each of which needs the result
  of the one before. The FFN of the block has 16 channels. The control is a model that has one
  step.

Steps are those of held-out answers. Times are CPU seconds of the reasoning block as generation runs
it, where patches that have halted are left out, over those of the same block with every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from models.agiformer.cache import ReasoningCache
from models.agiformer.carry import AgiformerCarry
from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY
from models.agiformer.reasoning import RecurrentReasoningBlock
from models.base import TokenInputs
from parallel.carry import SequentialModel
from tests.benchmarks.timing import Table, interleaved
from tests.evidence.training import IGNORED, Batch, future_leak, logits_of, over_seeds, train

PAIRS = 16
ROWS, LR, TEST_SEED, TEST_ROWS, ROUNDS = 32, 4e-3, 10_000, 64, 15
SHAPE = {
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


class Task(NamedTuple):
    """`draw(rows, generator)`: questions of `kinds`, in patches of `patch` tokens below `vocab`.
    `arms`: settings by name. `steps` of training."""

    draw: Callable[[int, torch.Generator], Questions]
    kinds: tuple[str, ...]
    vocab: int
    patch: int
    steps: int
    shape: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]


class Result(NamedTuple):
    """By kind: nats per scored byte, share of right ones, mean steps, and time of the block over
    that with every step. The largest future leak."""

    nats: dict[str, float]
    right: dict[str, float]
    steps: dict[str, float]
    time: dict[str, float]
    leak: float


BASE = 16


def draw_digits(rows: int, generator: torch.Generator) -> Questions:
    """Random rows; latent i sees all of patch i - 1 and predicts patch i."""
    kinds = torch.randint(3, (rows, PAIRS), generator=generator)
    a, b = torch.randint(BASE, (2, rows, PAIRS), generator=generator)
    easy = torch.stack((a, a, a, a), dim=-1)
    hard = torch.stack((a + b, a - b, a * b, a ^ b), dim=-1) % BASE
    noise = torch.randint(BASE, easy.shape, generator=generator)
    kind = kinds.unsqueeze(-1)
    answer = easy.where(kind == 0, hard.where(kind == 1, noise))
    fill = BASE + 3
    question = torch.stack((a, b, BASE + kinds, torch.full_like(a, fill)), dim=-1)
    return _rows(question, answer, answer, kinds, fill=fill)


STATES, LOOKUPS = 8, 4
_MOVES = torch.Generator().manual_seed(7)
# Row m: where permutation m leads from every state; the last one, which fills up, leads nowhere.
MOVES = torch.stack(
    [*(torch.randperm(STATES, generator=_MOVES) for _ in range(STATES)), torch.arange(STATES)]
)


def draw_permutations(rows: int, generator: torch.Generator) -> Questions:
    """Random rows: a state, 1 to 4 permutations; the first byte of an answer is the last state."""
    kinds = torch.randint(LOOKUPS, (rows, PAIRS), generator=generator)
    first = torch.randint(STATES, kinds.shape, generator=generator)
    moves = torch.randint(STATES, (rows, PAIRS, LOOKUPS), generator=generator)
    moves = moves.where(torch.arange(LOOKUPS) <= kinds.unsqueeze(-1), STATES)
    state, fill = first, 2 * STATES
    for move in moves.unbind(-1):
        state = MOVES[move, state]
    question = torch.cat((first.unsqueeze(-1), STATES + moves), dim=-1)
    question = pad(question, (0, 1), value=fill)
    answer = pad(state.unsqueeze(-1), (0, LOOKUPS + 1), value=fill)
    scored = pad(state.unsqueeze(-1), (0, LOOKUPS + 1), value=IGNORED)
    return _rows(question, answer, scored, kinds, fill=fill)


def _rows(
    question: Tensor, answer: Tensor, scored: Tensor, kinds: Tensor, *, fill: int
) -> Questions:
    text = torch.stack((question, answer), dim=2).flatten(1)
    labels = torch.stack((torch.full_like(answer, IGNORED), scored), dim=2).flatten(1)
    tokens = torch.cat((torch.full((len(text), 1), fill), text[:, :-1]), dim=1)
    return Questions(Batch(tokens, labels), kinds)


TASKS = {
    "permutations": Task(
        draw_permutations,
        kinds=("1", "2", "3", "4"),
        vocab=2 * STATES + 1,
        patch=LOOKUPS + 2,
        steps=600,
        shape=SHAPE | {"intermediate_size": 16},
        arms={
            "weight 0.03": {"ponder_loss_weight": 3e-2},
            "one step": {"thinking_steps": 1, "ponder_loss_weight": 0.0},
        },
    ),
    "digits": Task(
        draw_digits,
        kinds=("easy", "hard", "noise"),
        vocab=BASE + 4,  # digits, kinds, and what begins a row and fills up a question
        patch=4,
        steps=200,
        shape=SHAPE,
        arms={
            "weight 0.001": {"ponder_loss_weight": 1e-3},
            "weight 0.01": {"ponder_loss_weight": 1e-2},
        },
    ),
}


def batches(task: Task, *, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield task.draw(ROWS, generator).batch


def run(name: str, arm: str, *, seed: int, steps: int, rows: int = TEST_ROWS) -> Result:
    """Train one arm of a task, and look at held-out answers."""
    task = TASKS[name]
    sizes = {"vocab_size": task.vocab, "patch_size": task.patch, "patch_kernel": max(6, task.patch)}
    config = AgiformerConfig(**{**task.shape, **sizes, **task.arms[arm]})
    model = train(FAMILY, config, batches(task, seed=seed), steps=steps, lr=LR, seed=seed).model
    batch, kinds = task.draw(rows, torch.Generator().manual_seed(TEST_SEED))
    states = _states(model, batch.tokens)
    taken = _steps_taken(model, states).T[:, 1::2]
    logits = logits_of(model, batch.tokens).transpose(0, 1)
    answers = [x.unflatten(1, (-1, 2, task.patch))[:, :, 1] for x in (logits, batch.labels)]
    found = Result({}, {}, {}, {}, future_leak(model, batch.tokens[:2], vocab_size=task.vocab))
    for number, kind in enumerate(task.kinds):
        own = kinds == number
        guesses, labels = answers[0][own].flatten(0, 1), answers[1][own].flatten()
        found.nats[kind] = float(cross_entropy(guesses, labels, ignore_index=IGNORED))
        is_scored = labels != IGNORED
        right = guesses.argmax(dim=-1)[is_scored] == labels[is_scored]
        found.right[kind] = float(right.float().mean())
        found.steps[kind] = float(taken[own].mean())
        found.time[kind] = _time_share(model, states[1::2].transpose(0, 1)[own])
    print(f"{name}, {arm}, seed {seed}: {found}", flush=True)
    return found


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


def tables(num_seeds: int, *, steps: int | None = None) -> Iterator[Table]:
    """Loss, steps and time of every kind, for every arm of every task."""
    for name, task in TASKS.items():
        rows = []
        for arm in task.arms:
            results = [
                run(name, arm, seed=seed, steps=steps or task.steps) for seed in range(num_seeds)
            ]
            for kind in task.kinds:
                rows.append((f"{arm}, {kind}", *_columns(results, kind)))
        header = ("", "nats per byte", "right, %", "steps of 4", "time / all steps", "leak")
        yield Table(f"Thinking about {name} by kind, means over seeds", header, rows)


def _columns(results: list[Result], kind: str) -> tuple[str, ...]:
    return (
        over_seeds([r.nats[kind] for r in results]),
        over_seeds([100 * r.right[kind] for r in results], digits=1),
        over_seeds([r.steps[kind] for r in results], digits=2),
        over_seeds([r.time[kind] for r in results], digits=2),
        f"{max(r.leak for r in results):g}",
    )
