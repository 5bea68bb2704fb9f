"""Does choosing tokens pay? Byte models whose layers compute only some tokens, beside dense
ones and beside controls, at equal training FLOPs.

The text, its parts and the scoring are those of `language`. Every arm has the width, heads and
optimizer of the dense model, and as many steps more as it is cheaper. A routed model is scored by
its causal rule; beside it stands the oracle, which chooses the best tokens of the whole row and so
looks ahead: no legal score.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.model import DTF, MOD
from models.dynamic.token_router import TokenRouter
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from tests.benchmarks.timing import Table
from tests.evidence.language import (
    LENGTH,
    ROWS,
    VOCAB,
    Arm,
    Corpus,
    best_rate,
    bits_per_byte,
    fit,
    rows_at,
    steps_of,
)
from tests.evidence.training import Trained, future_leak, over_seeds

STEPS, RATES, SWEEP_SEED, TEST_ROWS = 300, (1e-3, 2e-3, 4e-3), 100, 128
GAMMAS = (0.5, 0.25, 0.125)
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": LENGTH,
    "qkv_bias": True,
    "tie_embeddings": True,
}
LAYERS = 6
# The average of a run of a few hundred steps must not remember the first of them.
_ROUTING = {"num_layers": LAYERS, "tau_momentum": 0.9, "force_first": True}


def _dense(num_layers: int) -> Arm:
    return Arm(LLAMA, LlamaConfig(**_SIZES, num_layers=num_layers))


def _mod(gamma: float, **changes: Any) -> Arm:
    return Arm(MOD, MoDConfig(**_SIZES, **_ROUTING, capacity_gamma=gamma, **changes))


def _dtf(gamma: float, **changes: Any) -> Arm:
    return Arm(DTF, DTFConfig(**_SIZES, **_ROUTING, capacity_gamma=gamma, **changes))


REFERENCE = "dense"
ARMS = {
    REFERENCE: _dense(LAYERS),
    "dense, routed layers removed": _dense(LAYERS // 2),
    **{f"mod, gamma {gamma:g}": _mod(gamma) for gamma in GAMMAS},
    "mod, gamma 0.25, random": _mod(0.25, router_score="random"),
    **{f"dtf, gamma {gamma:g}": _dtf(gamma) for gamma in GAMMAS[:2]},
    "dtf, gamma 0.25, linear": _dtf(0.25, router_score="linear"),
    "dtf, gamma 0.25, random": _dtf(0.25, router_score="random"),
}


class Score(NamedTuple):
    """Bits per byte by the causal rule and by the oracle; the share of tokens that the rule chose,
    and the largest change of an earlier logit by either."""

    causal: float
    oracle: float
    share: float
    leak: float
    oracle_leak: float


def own_steps(arm: Arm, steps: int) -> int:
    """Number of steps that cost as many FLOPs as `steps` of the dense model."""
    return steps_of(arm, steps, reference=ARMS[REFERENCE])


def score(trained: Trained, arm: Arm, corpus: Corpus, *, rows: int = TEST_ROWS) -> Score:
    sample = rows_at(corpus.test, torch.tensor([0, 1000])).tokens
    with _shares(trained.model) as shares:
        causal = bits_per_byte(trained, arm, corpus.test, rows=rows)
    leak = future_leak(trained.model, sample, vocab_size=VOCAB)
    if not shares:
        return Score(causal, causal, 1.0, leak, leak)
    with _oracle(trained.model):
        oracle = bits_per_byte(trained, arm, corpus.test, rows=rows)
        oracle_leak = future_leak(trained.model, sample, vocab_size=VOCAB)
    return Score(causal, oracle, sum(shares) / len(shares), leak, oracle_leak)


@contextmanager
def _shares(model: SequentialModel) -> Iterator[list[float]]:
    """What share of tokens every routed layer chooses in every call."""
    shares: list[float] = []
    hooks = [
        router.register_forward_hook(
            lambda _, __, routed: shares.append(float(routed.fraction.mean()))
        )
        for router in _routers(model)
    ]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _oracle(model: SequentialModel) -> Iterator[None]:
    """Let the routers of a model choose the best tokens of each row, later ones included."""
    usual = [(router, router.rule) for router in _routers(model)]
    for router, _ in usual:
        router.rule = "topk"
    try:
        yield
    finally:
        for router, rule in usual:
            router.rule = rule


def _routers(model: SequentialModel) -> list[TokenRouter]:
    return [module for module in model.modules() if isinstance(module, TokenRouter)]


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """Bits per byte of every arm over seeds."""
    corpus = Corpus.of_the_library()
    tuned = {"llama": REFERENCE, "mod": "mod, gamma 0.5", "dtf": "dtf, gamma 0.5"}
    rates = {
        family: best_rate(
            ARMS[name],
            corpus,
            steps=own_steps(ARMS[name], steps // 2),
            rates=RATES,
            rows=TEST_ROWS,
        )
        for family, name in tuned.items()
    }
    rows = []
    for name, arm in ARMS.items():
        lr, own = rates[arm.family.name], own_steps(arm, steps)
        scores = []
        for seed in range(num_seeds):
            scores.append(score(fit(arm, corpus, lr=lr, seed=seed, steps=own), arm, corpus))
        print(f"{name}: {scores}", flush=True)
        rows.append(_row(name, arm, scores, lr=lr, steps=own))
    header = (
        "", "parameters", "MFLOP per byte", "bytes seen", "lr", "bits per byte", "of the oracle",
        "chosen", "leak", "leak of the oracle",
    )  # fmt: skip
    yield Table("Held-out text at equal training FLOPs", header, rows)


def _row(name: str, arm: Arm, scores: list[Score], *, lr: float, steps: int) -> tuple[str, ...]:
    return (
        name,
        f"{arm.family.num_parameters(arm.config):,}",
        f"{arm.family.flops(arm.config, LENGTH) / 1e6:.2f}",
        f"{steps * ROWS * LENGTH:,}",
        f"{lr:g}",
        over_seeds([s.causal for s in scores]),
        over_seeds([s.oracle for s in scores]),
        over_seeds([s.share for s in scores]),
        f"{max(s.leak for s in scores):.2g}",
        f"{max(s.oracle_leak for s in scores):.2g}",
    )
