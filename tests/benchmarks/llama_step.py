"""Training step of a small llama in the engine of a run, beside a plain loop over transformers.

Both run in this process on the same tokens, from the same weights, step by step in turn. The losses
of every step must agree, or the comparison is void. The second table says where a step goes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.loading.batch import Batch
from models.registry import get_family
from pretrain.distributed.process_groups import process_group
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.benchmarks.training import (
    OurStep,
    TheirStep,
    copy_weights,
    random_batch,
    run_config,
    start_engine,
    transformers_model,
)

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_layers": 7,
    "num_heads": 8,
    "num_kv_heads": 4,
    "max_position_embeddings": 512,
    "tie_embeddings": True,
}
BATCH_SIZE, SEQ_LENGTH = 4, 512
ROUNDS, WARMUP, PROFILED_STEPS = 21, 2, 3


class Case(NamedTuple):
    """`zero_stage` 1 is what a run does unless it is told otherwise."""

    precision: str
    zero_stage: int


CASES = (Case("fp32", 0), Case("fp32", 1), Case("bf16", 1))
OURS, THEIRS = "manyformer", "transformers"

# Parts of kernel names -> what the kernel is for; the first that fits.
_KINDS = {
    "mm": "matrix products",
    "scaled_dot_product": "attention",
    "fused_adamw": "AdamW",
    "linalg_vector_norm": "gradient norm",
    "copy_": "copies and casts",
    "cat": "copies and casts",
    "fill_": "copies and casts",
}


def tables() -> Iterator[Table]:
    """Tokens/s of every case, then the milliseconds of a step by kind of kernel."""
    speeds, kinds = [], []
    with process_group() as device:
        for case in CASES:
            seconds, milliseconds = _compare(case, device)
            tokens = BATCH_SIZE * SEQ_LENGTH
            ours, theirs = (tokens / median(seconds[name]) for name in (OURS, THEIRS))
            label = f"{case.precision}, ZeRO-{case.zero_stage}"
            speeds.append((label, f"{ours:,.0f}", f"{theirs:,.0f}", ratio(seconds, OURS, THEIRS)))
            kinds += [
                (f"{label}, {name}", *(f"{by_kind.get(kind, 0.0):.0f}" for kind in _all_kinds()))
                for name, by_kind in milliseconds.items()
            ]
    yield Table(
        f"Training step, tokens/s: llama of {_num_parameters() / 1e6:.0f}M parameters, "
        f"{BATCH_SIZE} x {SEQ_LENGTH} tokens a step, medians of {ROUNDS} steps",
        ("", OURS, THEIRS, "ratio (quartiles)"),
        speeds,
    )
    yield Table("Milliseconds of a step by kind of kernel", ("", *_all_kinds()), kinds)


def _compare(
    case: Case, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    config = run_config(
        SHAPE, seq_length=SEQ_LENGTH, batch_size=BATCH_SIZE, precision=case.precision
    )
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
        engine = start_engine(
            config, device=device, ds_config=f"configs/ds/zero{case.zero_stage}.json"
        )
    model = transformers_model(config, device=device, dtype=torch.float32)
    copy_weights(config, engine.module, model)
    losses: dict[str, list[float]] = {OURS: [], THEIRS: []}

    def turn(name: str, step: Callable[[Batch], Tensor]) -> Callable[[], None]:
        return lambda: losses[name].append(
            step(random_batch(config, seed=len(losses[name]))).item()
        )

    theirs = TheirStep(model, autocast=case.precision == "bf16")
    steps: dict[str, Callable[[Batch], Tensor]] = {OURS: OurStep(engine), THEIRS: theirs}
    turns = {name: turn(name, step) for name, step in steps.items()}
    seconds = interleaved(turns, rounds=ROUNDS, warmup=WARMUP)
    furthest = max(abs(a - b) for a, b in zip(losses[OURS], losses[THEIRS], strict=True))
    if furthest > 0.05:
        raise RuntimeError(f"{case}: the two models' losses differ by {furthest:.3f}")
    return seconds, {name: _milliseconds_by_kind(step) for name, step in turns.items()}


def _milliseconds_by_kind(step: Callable[[], object]) -> dict[str, float]:
    with torch.profiler.profile() as profile:
        for _ in range(PROFILED_STEPS):
            step()
    total: dict[str, float] = {}
    for event in profile.key_averages():
        kind = next((k for part, k in _KINDS.items() if part in event.key), "elementwise, other")
        milliseconds = event.self_cpu_time_total / 1e3 / PROFILED_STEPS
        total[kind] = total.get(kind, 0.0) + milliseconds
    return total


def _all_kinds() -> list[str]:
    return [*dict.fromkeys(_KINDS.values()), "elementwise, other"]


def _num_parameters() -> int:
    family = get_family("llama")
    return family.num_parameters(family.config_cls.model_validate(SHAPE))
