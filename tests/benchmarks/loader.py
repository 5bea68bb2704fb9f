"""Loader against megatron.core's GPTDataset: `python -m tests.benchmarks.loader`.

Both read the same .bin/.idx (20M tokens, documents of 1000 on average) in shuffled order and yield
batches of 8 samples of 2048 tokens, in the caller and with one background worker: a thread here, a
process of torch's DataLoader there, as Megatron-LM does. The first line leaves the DataLoader out:
single samples of GPTDataset, not batched, against our batches. Rounds alternate; the median is
printed. Then both open a sparse corpus of 2 billion tokens in 2 million documents.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from data_tools.build import build_train_loader
from data_tools.config import DataConfig
from data_tools.indexed import HEADER, MAGIC
from data_tools.indexed_writer import IndexedDatasetWriter
from data_tools.loader import TrainLoader

SEQUENCE_LENGTH = 2048
BATCH_SIZE = 8
VOCAB_SIZE = 50_000
NUM_TOKENS = 20_000_000
NUM_ROUNDS = 5
ROUND_SECONDS = 1.0


class _Start(NamedTuple):
    seconds: float
    megabytes: float


class _Tokenizer:
    """What GPTDatasetConfig asks of a tokenizer."""

    vocab_size = VOCAB_SIZE
    eod = 0
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 - the attribute that Megatron reads


def main() -> None:
    """Run all and print one table."""
    torch.set_num_threads(1)
    logging.getLogger("data_tools").setLevel(logging.ERROR)  # the sparse corpus has no sidecar
    with tempfile.TemporaryDirectory() as folder:
        corpus, sparse = Path(folder) / "corpus", Path(folder) / "sparse"
        _write_corpus(corpus)
        _write_sparse_corpus(sparse)
        ours_start = _measure_start(lambda: next(_ours(sparse, 0)))
        _import_megatron()
        theirs_start = _measure_start(lambda: next(_their_batches(sparse, 0)))
        print(f"{'':34}{'ours':>12}{'GPTDataset':>14}{'ratio':>9}")
        for where, ours_iterator, theirs_iterator in (
            ("theirs not batched", _ours(corpus, 0), _their_samples(corpus)),
            ("in the caller", _ours(corpus, 0), _their_batches(corpus, 0)),
            ("one background worker", _ours(corpus, 1), _their_batches(corpus, 1)),
        ):
            ours, theirs = _samples_per_second(ours_iterator, theirs_iterator)
            ours_iterator.close()
            print(f"{'samples/s, ' + where:34}{ours:12,.0f}{theirs:14,.0f}{ours / theirs:8.1f}x")
    for what, index in (("seconds to the first batch", 0), ("MB more memory then", 1)):
        ours, theirs = ours_start[index], theirs_start[index]
        print(f"{'2e9 tokens: ' + what:34}{ours:12.2f}{theirs:14.2f}")


def _samples_per_second(*iterators: Iterator[object]) -> tuple[float, float]:
    """Medians of alternating rounds, ours and theirs; each item is 8 samples."""
    rates: tuple[list[float], list[float]] = ([], [])
    for iterator in iterators:
        next(iterator)
    for _ in range(NUM_ROUNDS):
        for iterator, results in zip(iterators, rates, strict=True):
            begin = time.perf_counter()
            count = 0
            while (elapsed := time.perf_counter() - begin) < ROUND_SECONDS:
                next(iterator)
                count += BATCH_SIZE
            results.append(count / elapsed)
    return median(rates[0]), median(rates[1])


def _ours(prefix: Path, num_workers: int) -> TrainLoader:
    section = {
        "train": str(prefix),
        "sequence_length": SEQUENCE_LENGTH,
        "num_workers": num_workers,
    }
    return build_train_loader(
        DataConfig.model_validate(section),
        sequence_length=SEQUENCE_LENGTH,
        micro_batch_size=BATCH_SIZE,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=VOCAB_SIZE,
    )


def _their_dataset(prefix: Path) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQUENCE_LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), documents, None, Split.train, config)


def _their_samples(prefix: Path) -> Iterator[list[dict[str, torch.Tensor]]]:
    dataset = _their_dataset(prefix)
    while True:
        for first in range(0, len(dataset) - BATCH_SIZE, BATCH_SIZE):
            yield [dataset[first + i] for i in range(BATCH_SIZE)]


def _their_batches(prefix: Path, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
    loader: Any = torch.utils.data.DataLoader(
        _their_dataset(prefix), batch_size=BATCH_SIZE, num_workers=num_workers, drop_last=True
    )
    while True:
        yield from loader


def _write_corpus(prefix: Path) -> None:
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, vocab_size=VOCAB_SIZE) as writer:
        written = 0
        while written < NUM_TOKENS:
            lengths = np.minimum(generator.geometric(1 / 1000, size=1000), 20_000)
            writer.add_documents(generator.integers(0, VOCAB_SIZE, size=lengths.sum()), lengths)
            written += int(lengths.sum())
        writer.finish(
            tokenizer="none", tokenizer_fingerprint="none", eod_id=None, num_bytes=1, command=""
        )


def _write_sparse_corpus(prefix: Path) -> None:
    num_documents, length = 2_000_000, 1000
    with open(prefix.with_suffix(".bin"), "wb") as file:
        file.truncate(2 * num_documents * length)
    with open(prefix.with_suffix(".idx"), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, num_documents, num_documents + 1))
        file.write(np.full(num_documents, length, dtype="<i4").tobytes())
        file.write((np.arange(num_documents, dtype="<i8") * 2 * length).tobytes())
        file.write(np.arange(num_documents + 1, dtype="<i8").tobytes())


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


def _import_megatron() -> None:
    # Seconds of import and a screen of warnings about optional parts; none concerns its datasets.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.datasets.gpt_dataset  # noqa: F401


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
