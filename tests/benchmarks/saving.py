"""Cost of a save for the step: in the step, in the background, and a bare copy to host memory.

All take turns on one engine in this process. The bare copy is of the same tensors into memory that
is there already; no save in the background can stall a step for less. DeepSpeed's own save of the
same engine neither hashes its files nor waits until they are on the disk.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from models.registry import get_family
from pretrain.checkpointing import CheckpointContents, CheckpointStore, Layout, RunIdentity
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.checkpointing.rng_state import rng_states
from pretrain.distributed.process_groups import process_group
from pretrain.engine.engine import Engine
from tests.benchmarks.timing import Table, ratio
from tests.benchmarks.training import OurStep, random_batch, run_config, start_engine

SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_layers": 9,
    "num_heads": 10,
    "num_kv_heads": 10,
    "max_position_embeddings": 512,
    "tie_embeddings": True,
}
BATCH_SIZE, SEQ_LENGTH = 2, 512
PRECISION, JSON_FILE = "bf16", "configs/ds/zero1.json"
ROUNDS, WARMUP = 7, 1
STEP, BESIDE = "a step", "a step while a save is written"
COPY, STALL = "a bare copy to host memory", "stall by a save in the background"
PUBLISHED, IN_STEP = "the same until it is published", "stall by a save in the step"
DEEPSPEED = "DeepSpeed's save_checkpoint"


def tables() -> Iterator[Table]:
    """One table: milliseconds of each, and how many times longer than the bare copy it takes."""
    with process_group() as device, tempfile.TemporaryDirectory() as folder:
        config = run_config(
            SHAPE, seq_length=SEQ_LENGTH, batch_size=BATCH_SIZE, precision=PRECISION
        )
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
            engine = start_engine(config, device=device, ds_config=JSON_FILE)
        step = OurStep(engine)
        seconds, size = _measure(
            engine, lambda: step(random_batch(config, seed=0)).item(), Path(folder)
        )
    family = get_family("llama")
    millions = family.num_parameters(family.config_cls.model_validate(SHAPE)) / 1e6
    yield Table(
        f"Saving a llama of {millions:.0f}M parameters, {PRECISION}, ZeRO-1, one process: "
        f"{size / 1e6:.0f} MB a checkpoint, medians of {ROUNDS}",
        ("", "milliseconds", "times the bare copy (quartiles)"),
        [
            (name, f"{median(times) * 1e3:,.0f}", ratio(seconds, COPY, name))
            for name, times in seconds.items()
        ],
    )


class _Clock:
    """Seconds of what is called through it, by name; nothing of the first rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.round = 0

    def __call__(self, name: str, *actions: Callable[[], object]) -> None:
        begin = time.perf_counter()
        for action in actions:
            action()
        if self.round >= WARMUP:
            self.seconds.setdefault(name, []).append(time.perf_counter() - begin)


def _measure(
    engine: Engine, step: Callable[[], object], folder: Path
) -> tuple[dict[str, list[float]], int]:
    """Seconds of everything in every round, and the bytes of a checkpoint."""
    in_step, background = _saves(folder / "a", False), _saves(folder / "b", True)
    copy, clock = _bare_copy(engine), _Clock()
    for clock.round in range(WARMUP + ROUNDS):
        clock(STEP, step)
        clock(COPY, copy)
        # The wait is timed from the save on, the step between them is not part of the stall.
        begin = time.perf_counter()
        clock(STALL, lambda: background.save(_contents(engine, clock.round)))
        clock(BESIDE, step)
        background.wait()
        last = time.perf_counter() - begin
        if clock.round >= WARMUP:
            clock.seconds.setdefault(PUBLISHED, []).append(last)
        clock(IN_STEP, lambda: in_step.save(_contents(engine, clock.round)))
        clock(DEEPSPEED, partial(_deepspeed_save, engine, folder / "c"))
        os.sync()  # what it left to be written must not burden the next round
    newest = folder / "b" / "checkpoints" / f"step_{clock.round}"
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return clock.seconds, size


def _saves(run_dir: Path, asynchronous: bool) -> Checkpointer:
    identity = RunIdentity(
        layout=Layout(zero_stage=1, precision=PRECISION), config={}, fingerprints={}
    )
    store = CheckpointStore(run_dir, identity=identity, keep=1)
    return Checkpointer(store, asynchronous=asynchronous, progress=str)


def _contents(engine: Engine, step: int) -> CheckpointContents:
    return CheckpointContents(
        step=step,
        weights=engine.weights(),
        rng=rng_states(),
        trainer={},
        optimizer=engine.optimizer_shard,
    )


def _bare_copy(engine: Engine) -> Callable[[], None]:
    contents = _contents(engine, 0)
    assert contents.optimizer is not None
    tensors = [w.load().detach() for w in (*contents.weights, *contents.optimizer().elements)]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = [
        (torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda), t) for t in tensors
    ]

    def copy() -> None:
        for buffer, tensor in pairs:
            buffer.copy_(tensor, non_blocking=True)
        if tensors[0].is_cuda:
            torch.cuda.current_stream().synchronize()

    return copy


def _deepspeed_save(engine: Any, directory: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        engine._deepspeed.save_checkpoint(str(directory), tag="tag", save_latest=False)
