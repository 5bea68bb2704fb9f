"""Training speed on one CUDA device beside transformers: `python -m tests.gpu.benchmark`.

Sizes of configs/model/llama, bf16, sequences of 2048 of random tokens. Ours is the engine of a run
(DeepSpeed, ZeRO-1, fused AdamW, clipping), eager and with `training.compile=true`. Theirs is a
plain loop over LlamaForCausalLM, eager and compiled: under autocast, with fp32 weights as ours, and
with bf16 weights, which train worse. All take the same batch: the largest that fits. Prints one
Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from data_tools.loading.batch import Batch
from models.registry import get_family
from pretrain.config import RunConfig
from pretrain.distributed.process_groups import process_group
from pretrain.metrics.flops import device_name, peak_flops, training_flops_per_token
from tests.benchmarks.timing import Table, machine
from tests.benchmarks.training import (
    OurStep,
    TheirStep,
    random_batch,
    run_config,
    start_engine,
    transformers_model,
)

MODELS = Path("configs/model/llama")
LARGEST_BATCH = {"125m": 16, "1b3": 8}

HEADER = ("bf16", "tokens/s", "ratio", "MFU", "peak GB")


class Contestant(NamedTuple):
    """`weights` None is ours; otherwise transformers' model with weights of that dtype."""

    weights: torch.dtype | None
    compiled: bool


# In the order of what is least missed when time runs out; the first is what ratios refer to.
CONTESTANTS = {
    "transformers": Contestant(torch.float32, False),
    "manyformer": Contestant(None, False),
    "manyformer, compiled": Contestant(None, True),
    "transformers, bf16 weights": Contestant(torch.bfloat16, False),
    "transformers, compiled": Contestant(torch.float32, True),
}


class Measured(NamedTuple):
    """`gigabytes`: the most that was allocated at a time; None on a CPU."""

    tokens_per_second: float
    gigabytes: float | None


def main() -> int:
    """Print the table; a contestant that no time is left for says so."""
    arguments = _parse()
    if not (torch.cuda.is_available() or arguments.cpu):
        print("error: no CUDA device; --cpu runs a small size on the CPU", file=sys.stderr)
        return 2
    print(f"{machine()}\n", flush=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    rows: list[tuple[str, ...]] = []
    for size in arguments.sizes:
        rows += _rows(size, arguments, deadline)
    print(Table(f"Training, sequences of {arguments.seq_length}", HEADER, rows))
    return 0


def _rows(size: str, arguments: argparse.Namespace, deadline: float) -> list[tuple[str, ...]]:
    """All contestants on the same batch, halved until it fits into the memory of each."""
    model = yaml.safe_load((MODELS / f"{size}.yaml").read_text())
    batch_size = LARGEST_BATCH.get(size, 4)
    while batch_size:
        config = run_config(
            model, seq_length=arguments.seq_length, batch_size=batch_size, precision="bf16"
        )
        results: dict[str, Measured | None] = {}
        for name, contestant in CONTESTANTS.items():
            if time.monotonic() > deadline:
                results[name] = None
                continue
            result = _in_a_new_process(contestant, config, arguments.steps)
            if result is None:
                break
            results[name] = result
        else:
            return _formatted(f"{size}, batch {batch_size}", config, results)
        batch_size //= 2
        print(f"{size}: out of memory, trying a batch of {batch_size}", flush=True)
    return [(f"{size}: does not fit", *[""] * (len(HEADER) - 1))]


def _in_a_new_process(contestant: Contestant, config: RunConfig, steps: int) -> Measured | None:
    """None: out of memory. DeepSpeed's engine keeps memory after its end; a process does not."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, contestant, config, steps).result()


def _measure(contestant: Contestant, config: RunConfig, steps: int) -> Measured | None:
    """Time `steps` steps after three that warm up; the device is waited for at both ends only."""
    with process_group() as device:
        on_cuda = device.type == "cuda"
        try:
            step = _build(contestant, config, device)
            batches = [random_batch(config, seed=seed) for seed in range(3)]
            for batch in batches:
                step(batch).item()
            begin = time.perf_counter()
            for number in range(steps):
                loss = step(batches[number % 3])
            loss.item()
        except torch.OutOfMemoryError:
            return None
        seconds = time.perf_counter() - begin
        tokens = steps * config.training.batch_size * config.data.sequence_length
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_cuda else None
        return Measured(tokens / seconds, peak)


def _build(
    contestant: Contestant, config: RunConfig, device: torch.device
) -> Callable[[Batch], Tensor]:
    if contestant.weights is None:
        training = config.training.model_copy(update={"compile": contestant.compiled})
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
            return OurStep(
                start_engine(config.model_copy(update={"training": training}), device=device)
            )
    model = transformers_model(config, device=device, dtype=contestant.weights)
    if contestant.compiled:
        model.compile(dynamic=False)
    return TheirStep(model, autocast=contestant.weights == torch.float32)


def _formatted(
    label: str, config: RunConfig, results: dict[str, Measured | None]
) -> list[tuple[str, ...]]:
    flops = training_flops_per_token(
        get_family(config.model.family), config.model, config.data.sequence_length
    )
    peak = peak_flops(device_name(), "bf16")
    baseline = results["transformers"]
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        if result is None or baseline is None:
            rows.append((f"{label}: {name}", "no time left", "", "", ""))
            continue
        rate = result.tokens_per_second
        rows.append(
            (
                f"{label}: {name}",
                f"{rate:,.0f}",
                f"{rate / baseline.tokens_per_second:.2f}x",
                "unknown peak" if peak is None else f"{100 * rate * flops / peak:.1f} %",
                "" if result.gigabytes is None else f"{result.gigabytes:.1f}",
            )
        )
    return rows


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.benchmark")
    parser.add_argument("--sizes", nargs="+", default=list(LARGEST_BATCH), help=f"in {MODELS}")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each contestant")
    parser.add_argument("--minutes", type=float, default=4.0, help="start no contestant later")
    parser.add_argument("--cpu", action="store_true", help="to try the script without a device")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
