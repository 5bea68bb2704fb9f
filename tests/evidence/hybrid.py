"""A DART beside llamas of its depth and of half of it at equal training FLOPs; what drafts save.

Text, split and optimizer are those of `language`, with one learning rate for all. `exact`: bits per
byte of the causal stream, all blocks hidden. `bound`: those of the diffusion stream over draws of
the noise, an upper bound with its standard error. `plan`: what the causal stream loses where its
plans are set to 0 after training. Samples continue 32 bytes of held-out text to 96; a judge, the
llama of full depth, says how well, in nats per byte; gaps are described in infilling.py. Gradient
norms are over draws of the noise for the same text: the weight of a block grows as 1/t where few of
its bytes are hidden.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.base import LossOutput, ModelFamily, TokenInputs
from models.dart.config import DARTConfig
from models.dart.generation import Generated
from models.dart.model import FAMILY as DART
from models.dart.modes import Request, continue_rows
from models.dart.sampling import Sampling
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.evidence import infilling
from tests.evidence.language import (
    LENGTH,
    ROWS,
    VOCAB,
    Corpus,
    batches,
    bits_per_byte,
    rows_at,
    steps_of,
)
from tests.evidence.training import Trained, future_leak, over_seeds, train

STEPS, LR, NUM_LAYERS = 32, 8e-3, 4
DRAWS, BOUND_ROWS, TEST_ROWS = 6, 16, 48
PROMPT, TOTAL = infilling.PROMPT, infilling.TOTAL
SAMPLES, DECODED, ROUNDS = 8, 2, 3
NORM_DRAWS, NORM_ROWS = 200, 8
JUDGE, FILLING = "llama, 4 layers", "dual, blocks of 16"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_layers": NUM_LAYERS,
    "num_heads": 4,
    "num_kv_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_embeddings": True,
    "init_std": 0.1,  # models of this width learn half a bit less in 80 steps with 0.02
}


class Arm(NamedTuple):
    """`frozen`: a part of parameters' names that stay as they begin."""

    family: ModelFamily
    config: Any
    frozen: str = "nothing"


def _dart(**changes: Any) -> DARTConfig:
    return DARTConfig(**{**_SHAPE, "diffusion_steps": 64, **changes})


ARMS = {
    JUDGE: Arm(LLAMA, LlamaConfig(**_SHAPE)),
    "llama, 2 layers": Arm(LLAMA, LlamaConfig(**{**_SHAPE, "num_layers": 2})),
    "dual, blocks of 16": Arm(DART, _dart()),
    "dual, blocks of 4": Arm(DART, _dart(block_size=4)),
    "dual, blocks of 8": Arm(DART, _dart(block_size=8)),
    "dual, blocks of 32": Arm(DART, _dart(block_size=32)),
    "dual, blocks of 16, no plans": Arm(DART, _dart(), ".exchange."),
    "shared, blocks of 16": Arm(DART, _dart(trunk="shared")),
}


def own_steps(arm: Arm, steps: int) -> int:
    """Number of steps that cost as many FLOPs as `steps` of the llama of full depth."""
    return steps_of(arm, steps, reference=ARMS[JUDGE])  # type: ignore[arg-type]


def fit(arm: Arm, corpus: Corpus, *, seed: int, steps: int) -> Trained:
    source = batches(corpus.train, seed=seed)
    return train(
        arm.family, arm.config, source, steps=own_steps(arm, steps), lr=LR, seed=seed,
        frozen=lambda name: arm.frozen in name,
    )  # fmt: skip


class Bound(NamedTuple):
    """Mean over draws of the noise, and its standard error; bits per byte."""

    mean: float
    error: float


def losses_of(
    trained: Trained, arm: Arm, text: Tensor, *, rows: int, draws: int
) -> Iterator[LossOutput]:
    """The loss of training for every draw of the noise, without the last byte of every row."""
    model = trained.model.train()
    batch = rows_at(text, torch.linspace(0, len(text) - LENGTH - 1, rows).long())
    labels = batch.labels.clone()
    labels[:, -1] = -100
    for draw in range(draws):
        # Other noise for every row, also where rows begin alike.
        salts = 1 + draw * rows + torch.arange(rows)
        model.get_submodule("embedding").salt = salts.unsqueeze(1)  # type: ignore[assignment]
        output = model(TokenInputs(batch.tokens))
        yield arm.family.loss(output, labels, config=arm.config, ctx=model.ctx)
    model.get_submodule("embedding").salt = 0  # type: ignore[assignment]
    model.eval()


@torch.no_grad()
def bound_of(trained: Trained, arm: Arm, text: Tensor) -> Bound:
    """Of the diffusion stream."""
    losses = losses_of(trained, arm, text, rows=BOUND_ROWS, draws=DRAWS)
    draws = [float(loss.terms["diffusion_loss"]) / math.log(2) for loss in losses]
    return Bound(statistics.fmean(draws), statistics.stdev(draws) / math.sqrt(DRAWS))


def gradient_norms(trained: Trained, arm: Arm, text: Tensor, *, draws: int) -> list[float]:
    """One for every draw of the noise, in ascending order."""
    parameters = [p for p in trained.model.parameters() if p.requires_grad]
    norms = []
    for loss in losses_of(trained, arm, text, rows=NORM_ROWS, draws=draws):
        gradients = torch.autograd.grad(loss.total, parameters, allow_unused=True)
        norms.append(float(torch.nn.utils.get_total_norm([g for g in gradients if g is not None])))
    return sorted(norms)


@torch.no_grad()
def without_plans(trained: Trained, arm: Arm, text: Tensor) -> float:
    """Bits per byte with every plan set to 0."""
    kept = {}
    for name, parameter in trained.model.named_parameters():
        if name.endswith("exchange.up.weight"):
            kept[name] = parameter.clone()
            parameter.zero_()
    found = bits_per_byte(trained, arm, text, rows=TEST_ROWS)  # type: ignore[arg-type]
    for name, parameter in trained.model.named_parameters():
        if name in kept:
            parameter.copy_(kept[name])
    return found


def written(trained: Trained, arm: Arm, prompts: Tensor, mode: Any, **options: Any) -> Generated:
    """Sampled at temperature 1 from the whole vocabulary, so that laws can be compared."""
    sampling = Sampling(1.0, None, None, generator=torch.Generator().manual_seed(0))
    request = Request(mode, TOTAL, sampling, **options)
    return continue_rows(trained.model, arm.config, prompts, request)


@torch.no_grad()
def judged(judge: SequentialModel, rows: Tensor) -> float:
    """Nats per byte of what follows the prompts, under the judge."""
    logits = judge(TokenInputs(rows[:, :-1])).transpose(0, 1).float()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), rows[:, 1:], reduction="none"
    )
    return float(losses[:, PROMPT - 1 :].mean())


def _speed(trained: Trained, arm: Arm, prompts: Tensor) -> tuple[str, ...]:
    """Bytes per draft and verification, bytes per pass, and time of decoding over speculation."""
    rows = prompts[:DECODED]
    ours = written(trained, arm, rows, "speculative")
    new = rows.shape[0] * (TOTAL - PROMPT)
    calls: dict[str, Callable[[], object]] = {
        mode: functools.partial(written, trained, arm, rows, mode) for mode in ("speculative", "ar")
    }
    # Row by row on both sides.
    calls["ar"] = lambda: [written(trained, arm, row, "ar") for row in rows.split(1)]
    seconds = interleaved(calls, rounds=ROUNDS, warmup=1)
    per_pass = new / ours.num_passes
    return f"{2 * per_pass:.2f}", f"{per_pass:.2f}", ratio(seconds, "speculative", "ar")


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """Likelihoods of every arm, speculative decoding, samples by diffusion, gradient norms."""
    corpus = Corpus.of_the_library()
    fitted: dict[str, list[Trained]] = {}
    rows = []
    for name, arm in ARMS.items():
        fitted[name] = [fit(arm, corpus, seed=seed, steps=steps) for seed in range(num_seeds)]
        rows.append(_likelihoods(name, arm, fitted[name], corpus, steps))
        print(rows[-1], flush=True)
    header = ("", "parameters", "MFLOP per byte", "bytes seen", "exact", "bound", "plan", "leak")
    yield Table("Bits per byte of held-out text at equal training FLOPs", header, rows)
    prompts = rows_at(corpus.test, torch.linspace(0, len(corpus.test) - LENGTH - 1, SAMPLES).long())
    starts = prompts.tokens[:, :PROMPT]
    drafted = [name for name, arm in ARMS.items() if arm.family is DART and not _has_no_plan(arm)]
    yield Table(
        "Speculative decoding, seed 0, one row at a time",
        ("", "bytes per draft and check", "bytes per pass", "time of ar over speculative"),
        [(name, *_speed(fitted[name][0], ARMS[name], starts)) for name in drafted],
    )
    yield Table(
        "Samples by diffusion under the judge, nats per byte",
        ("", "bytes per denoising pass", "judge"),
        _samples(fitted, starts),
    )
    filling = ARMS[FILLING]
    gapped = rows_at(
        corpus.test, torch.linspace(0, len(corpus.test) - LENGTH - 1, TEST_ROWS).long()
    )
    yield infilling.table(
        FILLING,
        filling.config,
        fitted[FILLING],
        fitted[JUDGE],
        (filling.family, ARMS[JUDGE].family),
        gapped.tokens[:, : infilling.TOTAL],
    )
    yield Table(
        f"Gradient norms of the loss over {NORM_DRAWS} draws of the noise, seed 0",
        ("", "10 %", "median", "90 %", "99 %", "largest"),
        [(name, *_spread(fitted[name][0], ARMS[name], corpus.test)) for name in drafted],
    )


def _has_no_plan(arm: Arm) -> bool:
    return arm.frozen != Arm._field_defaults["frozen"]


def _likelihoods(
    name: str, arm: Arm, fitted: list[Trained], corpus: Corpus, steps: int
) -> tuple[str, ...]:
    text = corpus.test
    exact = [bits_per_byte(each, arm, text, rows=TEST_ROWS) for each in fitted]  # type: ignore[arg-type]
    bound = plan = "-"
    if arm.family is DART:
        bounds = [bound_of(each, arm, text) for each in fitted]
        errors = max(each.error for each in bounds)
        bound = f"<= {over_seeds([each.mean for each in bounds])} (s.e. {errors:.3f})"
        if not _has_no_plan(arm):
            worse = [without_plans(t, arm, text) - e for t, e in zip(fitted, exact, strict=True)]
            plan = f"{over_seeds(worse)}"
    sample = rows_at(text, torch.tensor([0, 1000])).tokens
    leaks = [future_leak(each.model, sample, vocab_size=VOCAB) for each in fitted]
    return (
        name,
        f"{arm.family.num_parameters(arm.config):,}",
        f"{arm.family.flops(arm.config, LENGTH) / 1e6:.2f}",
        f"{own_steps(arm, steps) * ROWS * LENGTH:,}",
        over_seeds(exact),
        bound,
        plan,
        f"{max(leaks):g}",
    )


def _spread(trained: Trained, arm: Arm, text: Tensor) -> list[str]:
    norms = gradient_norms(trained, arm, text, draws=NORM_DRAWS)
    return [f"{norms[math.ceil(share * len(norms)) - 1]:.3f}" for share in (0.1, 0.5, 0.9, 0.99, 1)]


def _samples(fitted: dict[str, list[Trained]], starts: Tensor) -> list[tuple[str, ...]]:
    name = "dual, blocks of 16"
    arm, judges = ARMS[name], fitted[JUDGE]
    rows = []
    settings: dict[str, tuple[Any, dict[str, Any]]] = {"ar": ("ar", {})}
    for num_steps in (1, 4, 8, 16):
        settings[f"diffusion, {num_steps} passes a block"] = ("diffusion", {"num_steps": num_steps})
    for label, (mode, options) in settings.items():
        scores = [
            judged(judge.model, written(trained, arm, starts, mode, **options).tokens)
            for trained, judge in zip(fitted[name], judges, strict=True)
        ]
        size = 1.0 if mode == "ar" else arm.config.block_size / options["num_steps"]
        rows.append((label, f"{size:g}", over_seeds(scores)))
    return rows
