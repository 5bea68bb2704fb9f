"""Loader against megatron.core's GPTDataset on the same .bin/.idx, and what starting costs.

Both read 20M tokens (documents of 1000 on average) in shuffled order and yield batches of 8 samples
of 2048 tokens, in the caller and with one background worker: a thread here, a process of torch's
DataLoader there, as Megatron-LM does. The first row leaves the DataLoader out: single samples of
GPTDataset, not batched, against our batches. Then both open a sparse corpus of 2 billion tokens in
2 million documents.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from data_tools.build import build_train_loader
from data_tools.config import DataConfig
from data_tools.loader import TrainLoader
from tests.benchmarks import gpt_dataset
from tests.benchmarks.timing import Table

SEQ_LENGTH, BATCH_SIZE, VOCAB_SIZE = 2048, 8, 50_000
NUM_TOKENS = 20_000_000
SPARSE_DOCUMENTS, SPARSE_LENGTH = 2_000_000, 1000
ROUNDS, ROUND_SECONDS = 5, 1.0


class _Start(NamedTuple):
    seconds: float
    megabytes: float


def tables() -> Iterator[Table]:
    """Samples/s, then seconds and memory until the first batch."""
    torch.set_num_threads(1)
    logging.getLogger("data_tools").setLevel(logging.ERROR)  # the sparse corpus has no sidecar
    with tempfile.TemporaryDirectory() as folder:
        # Memory is measured before anything large has been allocated and freed.
        gpt_dataset.import_megatron()
        start = _start(Path(folder, "sparse"))
        yield _speed(Path(folder, "corpus"))
        yield start


def _speed(prefix: Path) -> Table:
    gpt_dataset.write_corpus(prefix, num_tokens=NUM_TOKENS, vocab_size=VOCAB_SIZE)
    theirs = gpt_dataset.gpt_dataset(prefix, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE)
    rows = []
    for where, workers, their_iterator in (
        ("theirs not batched", 0, gpt_dataset.samples(theirs, batch_size=BATCH_SIZE)),
        ("in the caller", 0, _their_batches(theirs, 0)),
        ("one background worker", 1, _their_batches(theirs, 1)),
    ):
        our_iterator = _ours(prefix, workers)
        ours_rate, their_rate = _samples_per_second(our_iterator, their_iterator)
        our_iterator.close()
        ratio = f"{ours_rate / their_rate:.1f}x"
        rows.append((where, f"{ours_rate:,.0f}", f"{their_rate:,.0f}", ratio))
    title = f"Samples/s of {SEQ_LENGTH} tokens, median of {ROUNDS} rounds in turn"
    return Table(title, ("", "manyformer", "GPTDataset", "ratio"), rows)


def _start(prefix: Path) -> Table:
    gpt_dataset.write_sparse_corpus(prefix, num_documents=SPARSE_DOCUMENTS, length=SPARSE_LENGTH)
    ours = _measure_start(lambda: next(_ours(prefix, 0)))
    theirs = _measure_start(
        lambda: next(
            _their_batches(
                gpt_dataset.gpt_dataset(prefix, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE), 0
            )
        )
    )
    billions = SPARSE_DOCUMENTS * SPARSE_LENGTH / 1e9
    return Table(
        f"Opening a sparse corpus of {billions:.0f} billion tokens, until the first batch",
        ("", "manyformer", "GPTDataset"),
        [
            ("seconds", f"{ours.seconds:.2f}", f"{theirs.seconds:.2f}"),
            ("more memory, MB", f"{ours.megabytes:.0f}", f"{theirs.megabytes:.0f}"),
        ],
    )


def _samples_per_second(*iterators: Iterator[object]) -> tuple[float, float]:
    """Medians of alternating rounds of a fixed time, ours and theirs."""
    rates: tuple[list[float], list[float]] = ([], [])
    for iterator in iterators:
        next(iterator)
    for _ in range(ROUNDS):
        for iterator, results in zip(iterators, rates, strict=True):
            begin, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - begin) < ROUND_SECONDS:
                next(iterator)
                count += BATCH_SIZE
            results.append(count / elapsed)
    return median(rates[0]), median(rates[1])


def _ours(prefix: Path, num_workers: int) -> TrainLoader:
    section = {"train": str(prefix), "sequence_length": SEQ_LENGTH, "num_workers": num_workers}
    return build_train_loader(
        DataConfig.model_validate(section),
        sequence_length=SEQ_LENGTH,
        micro_batch_size=BATCH_SIZE,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=VOCAB_SIZE,
    )


def _their_batches(dataset: object, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
    return gpt_dataset.batches(dataset, batch_size=BATCH_SIZE, num_workers=num_workers)


def _measure_start(start: Callable[[], object]) -> _Start:
    before, begin = _resident_megabytes(), time.perf_counter()
    kept = start()
    seconds = time.perf_counter() - begin
    megabytes = _resident_megabytes() - before
    del kept
    return _Start(seconds, megabytes)


def _resident_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s*(\d+) kB", status)
    return int(found[1]) / 1024 if found else float("nan")
