"""A small corpus in the form that a run's data section names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_tools.config import DataConfig, SourceConfig
from data_tools.corpus.indexed_writer import IndexedDatasetWriter

Documents = list[np.ndarray]

_LEAST_WINDOWS = 2  # of a source, so that there is something to shuffle


def make_corpus(data: DataConfig, folder: Path, *, vocab_size: int, num_tokens: int) -> DataConfig:
    """Write every source of `data` below `folder`: about `num_tokens` ids to train on, by weight,
    and as many in every held-out source.

    Ids follow a pattern that a model can learn; documents differ in length, so that windows hold
    several of them and parts of one. Returns `data` with the new paths.
    """
    draw = np.random.default_rng(0)
    splits: dict[str, tuple[SourceConfig, ...]] = {}
    for split in ("train", "validation"):
        made = []
        total = sum(source.weight for source in data.train) if split == "train" else None
        for source in getattr(data, split):
            path = folder / split / source.name
            path.parent.mkdir(parents=True, exist_ok=True)
            ids = 255 if data.kind == "bytes" else vocab_size - 1
            write = _write_tokens if data.kind == "tokens" else _write_bytes
            share = 1.0 if total is None else source.weight / total
            size = max(round(num_tokens * share), _LEAST_WINDOWS * data.sequence_length)
            write(path, _documents(draw, ids, size), data, vocab_size)
            made.append(source.model_copy(update={"path": str(path)}))
        splits[split] = tuple(made)
    return data.model_copy(update=splits)


def _documents(draw: np.random.Generator, num_ids: int, num_tokens: int) -> Documents:
    """Steps of 1, 2 or 5 from id to id, below `num_ids`; the next id ends a document."""
    documents: Documents = []
    while sum(map(len, documents)) < num_tokens:
        steps = draw.choice([1, 2, 5], size=int(draw.integers(3, 30)))
        documents.append((draw.integers(num_ids) + steps.cumsum()) % num_ids)
    return documents


def _write_tokens(path: Path, documents: Documents, data: DataConfig, vocab_size: int) -> None:
    end = vocab_size - 1
    with IndexedDatasetWriter(path, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add_document(np.append(document, end))
        writer.finish(
            tokenizer="none",
            tokenizer_fingerprint="0" * 64,
            eod_id=end,
            bos_ids=(),
            special_tokens="plain",
            num_bytes=4 * sum(map(len, documents)),
            command="pretrain.prove",
        )


def _write_bytes(path: Path, documents: Documents, data: DataConfig, vocab_size: int) -> None:
    path.mkdir()
    texts = ["".join(chr(97 + int(i) % 26) for i in document) for document in documents]
    if data.documents == "blank_line":
        (path / "text.txt").write_text("\n\n".join(texts))
    elif data.documents == "jsonl":
        lines = [json.dumps({data.json_key or "text": text}) for text in texts]
        (path / "text.jsonl").write_text("\n".join(lines) + "\n")
    else:
        for number, text in enumerate(texts):
            (path / f"{number:04d}.txt").write_text(text)
