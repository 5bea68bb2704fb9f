"""Peak memory of a training step in the engine of a run, beside a plain loop over transformers.

Each side has a process of its own: what it adds to the memory that it held before its first step,
by `ru_maxrss`. Rows are longer and the vocabulary larger than in `step`, because logits are
what weighs: their bytes stand beside. The second table is what `training.logits_parts` costs: both
engines in one process, in turn.
"""

from __future__ import annotations

import contextlib
import io
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from data_tools.loading.batch import Batch
from pretrain.config import RunConfig
from pretrain.distributed.process_groups import process_group
from tests.benchmarks.step import OURS, SHAPE, THEIRS
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.benchmarks.training import (
    OurStep,
    TheirStep,
    random_batch,
    run_config,
    start_engine,
    transformers_model,
)

VOCABULARIES = (32_000, 128_000)
BATCH_SIZE, SEQ_LENGTH, STEPS = 8, 512, 2
PARTS = 8
IN_PARTS = f"{OURS}, logits in {PARTS} parts"
ROUNDS = 7


def tables() -> Iterator[Table]:
    """One row per vocabulary and side."""
    rows = []
    for size in VOCABULARIES:
        megabytes = {side: _in_a_process(side, size) for side in (OURS, IN_PARTS, THEIRS)}
        logits = BATCH_SIZE * SEQ_LENGTH * size * 4 / 1e6
        rows += [
            (f"{size:,}", f"{logits:.0f}", side, f"{mb:.0f}", f"{mb / megabytes[THEIRS]:.2f}")
            for side, mb in megabytes.items()
        ]
    header = ("vocabulary", "MB of logits", "", "MB above what the process held", "over theirs")
    tokens = BATCH_SIZE * SEQ_LENGTH
    yield Table(f"Peak memory of a step, fp32, {tokens:,} tokens a micro-batch", header, rows)
    with process_group() as device:
        with contextlib.redirect_stdout(io.StringIO()):
            sides = {
                side: OurStep(start_engine(_config(side, VOCABULARIES[0]), device=device))
                for side in (OURS, IN_PARTS)
            }
        batch = random_batch(_config(OURS, VOCABULARIES[0]), seed=0)
        seconds = interleaved(
            {side: partial(step, batch) for side, step in sides.items()}, rounds=ROUNDS, warmup=1
        )
    yield Table(
        f"Time of the same step, vocabulary {VOCABULARIES[0]:,}",
        ("", "seconds", f"over that of {OURS}"),
        [
            (OURS, f"{median(seconds[OURS]):.2f}", "1.00x"),
            (IN_PARTS, f"{median(seconds[IN_PARTS]):.2f}", ratio(seconds, OURS, IN_PARTS)),
        ],
    )


def _config(side: str, vocab_size: int) -> RunConfig:
    return run_config(
        {**SHAPE, "vocab_size": vocab_size},
        seq_length=SEQ_LENGTH,
        batch_size=BATCH_SIZE,
        precision="fp32",
        logits_parts=PARTS if side == IN_PARTS else 1,
    )


def _in_a_process(side: str, vocab_size: int) -> float:
    module = "tests.benchmarks.runs.step_memory"
    command = [sys.executable, "-m", module, side, str(vocab_size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def _added_megabytes(side: str, vocab_size: int) -> float:
    config = _config(side, vocab_size)
    with process_group() as device, contextlib.redirect_stdout(io.StringIO()):
        step: Callable[[Batch], Tensor]
        if side != THEIRS:
            step = OurStep(start_engine(config, device=device))
        else:
            model = transformers_model(config, device=device, dtype=torch.float32)
            step = TheirStep(model, autocast=False)
        before = _megabytes()
        for number in range(STEPS):
            step(random_batch(config, seed=number))
        return _megabytes() - before


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    print(_added_megabytes(sys.argv[1], int(sys.argv[2])))
