"""Attention memory across layers: is it used after a fine-tune, and does it pay from scratch?

Text, split, rows and optimizer are those of `language`. *Injected*: a Llama of transformers is
trained on bytes, then fine-tuned with the memory of its last two layers, from the same weights in
every arm; afterwards W_m is set to 0, which leaves out what the memory adds and nothing else. *From
scratch*: an AMRPALlama beside a llama of its shape at equal training FLOPs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from models.amrpa import AMRPAConfig, get_amrpa_metrics, inject_amrpa
from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.model import FAMILY as AMRPA
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from tests.benchmarks.timing import Table
from tests.evidence.language import (
    LENGTH,
    VOCAB,
    Arm,
    Corpus,
    batches,
    best_rate,
    bits_per_byte,
    fit,
    rows_at,
    steps_of,
)
from tests.evidence.training import Batch, future_leak, optimizer_of, over_seeds, schedule

STEPS, RATES = 200, (4e-3, 8e-3)
BASE_STEPS, TUNING_STEPS, BASE_LR, TUNING_LR = 150, 60, 4e-3, 2e-3
TEST_ROWS = 128

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "max_position_embeddings": LENGTH,
}
_HEADS: dict[str, Any] = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 4}
_MEMORY: dict[str, Any] = {"target_layers": "last_2", "alpha_mlp_hidden": 32}


SCRATCH = {
    "llama": Arm(LLAMA, LlamaConfig(**_SHAPE, **_HEADS, tie_embeddings=True)),
    "amrpa, qk": Arm(AMRPA, AMRPALlamaConfig(**_SHAPE, **_HEADS, **_MEMORY, tie_embeddings=True)),
    "amrpa, context": Arm(
        AMRPA,
        AMRPALlamaConfig(
            **_SHAPE, **_HEADS, **_MEMORY, tie_embeddings=True, history_kind="context"
        ),
    ),
}
# What is trained in each arm of the fine-tune.
INJECTED = ("memory alone", "layers with memory", "everything", "everything, no memory")


def own_steps(arm: Arm, steps: int) -> int:
    """Number of steps that cost as many FLOPs as `steps` of the llama."""
    return steps_of(arm, steps, reference=SCRATCH["llama"])


def train(model: nn.Module, source: Iterator[Batch], *, steps: int, lr: float) -> None:
    """`tests.evidence.training.train` for a model of transformers; in place."""
    model.train()
    optimizer = optimizer_of(model, lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        tokens = next(source).tokens
        model(tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor, *, rows: int = TEST_ROWS) -> float:
    """Bits per byte over `rows` rows that are spread evenly over the text."""
    total = 0.0
    for part in torch.linspace(0, len(text) - LENGTH - 1, rows).long().split(16):
        batch = rows_at(text, part)
        logits = model(batch.tokens).logits.transpose(1, 2).double()
        total += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    return total / (rows * LENGTH * math.log(2))


def base_model(corpus: Corpus, *, seed: int, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = TheirConfig(
        **_SHAPE, num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config)
    train(model, batches(corpus.train, seed=seed), steps=steps, lr=BASE_LR)
    return model


class Tuned(NamedTuple):
    """Bits per byte after the fine-tune, and with W_m set to 0; the mean gate."""

    bits: float
    without: float
    gate: float


def tune(
    base: LlamaForCausalLM,
    arm: str,
    corpus: Corpus,
    *,
    seed: int,
    steps: int,
    rows: int = TEST_ROWS,
) -> Tuned:
    """Fine-tune a copy of `base` on bytes that it has not been trained on."""
    model: Any = copy.deepcopy(base)
    torch.manual_seed(1000 + seed)
    if arm != "everything, no memory":
        frozen = arm != "everything"
        settings = {"freeze_base_model": frozen, "freeze_embeddings": frozen, "dropout": 0.0}
        inject_amrpa(model, AMRPAConfig(**_MEMORY, **settings))
    if arm == "memory alone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".amrpa." in name)
    train(model, batches(corpus.train, seed=1000 + seed), steps=steps, lr=TUNING_LR)
    bits = held_out(model, corpus.test, rows=rows)
    if arm == "everything, no memory":
        return Tuned(bits, bits, 0.0)
    gate = float(get_amrpa_metrics(model)["gate_impact"].mean())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("memory_weight"):
                parameter.zero_()
    return Tuned(bits, held_out(model, corpus.test, rows=rows), gate)


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """The fine-tunes, then the comparison from scratch."""
    corpus = Corpus.of_the_library()
    yield _injected_table(corpus, num_seeds)
    yield _scratch_table(corpus, num_seeds, steps)


def _injected_table(corpus: Corpus, num_seeds: int) -> Table:
    bases = [base_model(corpus, seed=seed, steps=BASE_STEPS) for seed in range(num_seeds)]
    before = [held_out(base, corpus.test) for base in bases]
    print(f"before the fine-tune: {before}", flush=True)
    rows = [("before", over_seeds(before), "-", "-", "-")]
    for arm in INJECTED:
        found = [
            tune(base, arm, corpus, seed=seed, steps=TUNING_STEPS)
            for seed, base in enumerate(bases)
        ]
        print(f"{arm}: {found}", flush=True)
        own = over_seeds([each.bits for each in found])
        if arm == INJECTED[-1]:
            rows.append((arm, own, "-", "-", "-"))
            continue
        rows.append(
            (
                arm,
                own,
                over_seeds([each.without for each in found]),
                over_seeds([each.without - each.bits for each in found], digits=4),
                over_seeds([each.gate for each in found]),
            )
        )
    header = ("trained", "bits per byte", "with W_m = 0", "what zeroing costs", "mean gate")
    return Table("A small Llama, fine-tuned with the memory injected", header, rows)


def _scratch_table(corpus: Corpus, num_seeds: int, steps: int) -> Table:
    rows = []
    for name, arm in SCRATCH.items():
        half, own = own_steps(arm, steps // 2), own_steps(arm, steps)
        lr = best_rate(arm, corpus, steps=half, rates=RATES, rows=TEST_ROWS)
        fitted = [fit(arm, corpus, lr=lr, seed=seed, steps=own) for seed in range(num_seeds)]
        bits = [bits_per_byte(each, arm, corpus.test, rows=TEST_ROWS) for each in fitted]
        print(f"{name}: {bits}", flush=True)
        sample = rows_at(corpus.test, torch.tensor([0, 1000])).tokens
        leaks = [future_leak(each.model, sample, vocab_size=VOCAB) for each in fitted]
        rows.append(
            (
                name,
                f"{arm.family.num_parameters(arm.config):,}",
                f"{arm.family.flops(arm.config, LENGTH) / 1e6:.2f}",
                f"{own:,}",
                f"{lr:g}",
                over_seeds(bits),
                over_seeds([each.terms["gate_impact"] for each in fitted])
                if arm.family is AMRPA
                else "-",
                f"{max(leaks):g}",
            )
        )
    header = (
        "", "parameters", "MFLOP per byte", "steps", "lr", "bits per byte", "mean gate", "leak",
    )  # fmt: skip
    return Table("From scratch at equal training FLOPs", header, rows)
