"""The other side of the loader benchmark: megatron.core's GPTDataset, and corpora for both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.corpus.indexed import HEADER, MAGIC
from data_tools.corpus.indexed_writer import IndexedDatasetWriter


class _Tokenizer:
    """The interface that GPTDatasetConfig requires of a tokenizer."""

    eod = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers: dict[str, str] = {}


def import_megatron() -> None:
    """Import it now: it takes seconds and warns about optional parts, none of them a dataset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.datasets.gpt_dataset  # noqa: F401


def gpt_dataset(prefix: Path, *, seq_length: int, vocab_size: int) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=_Tokenizer(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), documents, None, Split.train, config)


def blended_dataset(prefixes: Sequence[Path], *, seq_length: int, vocab_size: int) -> Any:
    """Megatron's blend of GPTDatasets in equal parts, nearly an epoch of each."""
    from megatron.core.datasets.blended_dataset import BlendedDataset

    datasets = [gpt_dataset(p, seq_length=seq_length, vocab_size=vocab_size) for p in prefixes]
    size = int(0.9 * sum(map(len, datasets)))
    return BlendedDataset(datasets, [1.0] * len(datasets), size, datasets[0].config)


def samples(dataset: Any, *, batch_size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Its samples as they come, not batched, again and again."""
    while True:
        for first in range(0, len(dataset) - batch_size, batch_size):
            yield [dataset[first + i] for i in range(batch_size)]


def batches(
    dataset: Any, *, batch_size: int, num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of torch's DataLoader, again and again, as Megatron-LM has them."""
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, drop_last=True
    )
    while True:
        yield from loader


def write_corpus(prefix: Path, *, num_tokens: int, vocab_size: int) -> None:
    """Random documents of 1000 tokens on average."""
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        written = 0
        while written < num_tokens:
            lengths = np.minimum(generator.geometric(1 / 1000, size=1000), 20_000)
            writer.add_documents(generator.integers(0, vocab_size, size=lengths.sum()), lengths)
            written += int(lengths.sum())
        writer.finish(
            tokenizer="none", tokenizer_fingerprint="none", eod_id=None, num_bytes=1, command=""
        )


def write_sparse_corpus(prefix: Path, *, num_documents: int, length: int) -> None:
    """Documents of zeros that take no space on disk."""
    with open(prefix.with_suffix(".bin"), "wb") as file:
        file.truncate(2 * num_documents * length)
    with open(prefix.with_suffix(".idx"), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, num_documents, num_documents + 1))
        file.write(np.full(num_documents, length, dtype="<i4").tobytes())
        file.write((np.arange(num_documents, dtype="<i8") * 2 * length).tobytes())
        file.write(np.arange(num_documents + 1, dtype="<i8").tobytes())
