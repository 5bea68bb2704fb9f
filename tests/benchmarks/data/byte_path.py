"""Raw text to batches, MB/s of one core, against the usual loop over a memory map.

The other side is what small trainers do (nanoGPT's get_batch): windows at random places of one
np.memmap of uint8, stacked row by row into int64 tokens and labels. It has no documents, no epochs
and no end tokens. The text is the source of Python's standard library, repeated to 150 MB; one
byte is one token.
"""

from __future__ import annotations

import json
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from data_tools.config import DataConfig
from data_tools.loading.builders import build_train_loader
from tests.benchmarks.timing import Table, interleaved, ratio

SEQ_LENGTHS, BATCH_TOKENS = (1024, 2048, 32_768), 32_768
NUM_FILES, DOCUMENT_CHARACTERS = 8, 4000
ROUNDS, WARMUP, BATCHES = 15, 1, 100
OURS, THEIRS = "manyformer", "get_batch"

# Name of the row -> settings
CASES: dict[str, dict[str, Any]] = {
    "files": {},
    "files, reset at documents": {"reset_at_documents": True},
    "blank lines": {"documents": "blank_line"},
    "blank lines, reset at documents": {"documents": "blank_line", "reset_at_documents": True},
    "jsonl": {"documents": "jsonl"},
}


def tables() -> Iterator[Table]:
    """MB/s of every kind of document and length."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text, lines = _write(Path(folder))
        data = np.memmap(Path(folder, "all"), dtype=np.uint8, mode="r")
        yield Table(
            f"Text to batches of {BATCH_TOKENS:,} bytes in the caller, MB/s, medians of {ROUNDS} "
            "rounds in turn",
            ("", OURS, THEIRS, "ratio (quartiles)"),
            [
                _row(
                    f"{length:,}, {name}",
                    lines if name == "jsonl" else text,
                    settings,
                    length,
                    data,
                )
                for name, settings in CASES.items()
                for length in SEQ_LENGTHS
            ],
        )


def _row(
    label: str, path: Path, settings: dict[str, Any], length: int, data: np.ndarray
) -> tuple[str, ...]:
    rows = BATCH_TOKENS // length
    if settings.get("documents") == "jsonl":
        settings = {**settings, "cache_dir": str(path.parent / "cache")}
    config = DataConfig.model_validate(
        {
            "kind": "bytes",
            "train": str(path),
            "sequence_length": length,
            "num_workers": 0,
            **settings,
        }
    )
    loader = build_train_loader(
        config,
        sequence_length=length,
        micro_batch_size=rows,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=257,
    )
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: _repeat(lambda: next(loader)),
        THEIRS: lambda: _repeat(lambda: _get_batch(data, rows, length)),
    }
    seconds = interleaved(contestants, rounds=ROUNDS, warmup=WARMUP)
    speeds = [BATCHES * BATCH_TOKENS / median(seconds[name]) / 1e6 for name in (OURS, THEIRS)]
    return label, *(f"{speed:,.0f}" for speed in speeds), ratio(seconds, OURS, THEIRS)


def _repeat(draw: Callable[[], object]) -> None:
    for _ in range(BATCHES):
        draw()  # dropped at once, as by a step that has used it


def _get_batch(data: np.ndarray, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.randint(len(data) - length, (rows,)).tolist()
    tokens, labels = (
        torch.stack(
            [
                torch.from_numpy(data[i + shift : i + shift + length].astype(np.int64))
                for i in places
            ]
        )
        for shift in (0, 1)
    )
    return tokens, labels


def _write(folder: Path) -> tuple[Path, Path]:
    """The folders of text files and of .jsonl, and everything in one file."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    text = "".join(path.read_text(errors="ignore") for path in sources)
    folders = folder / "text", folder / "jsonl"
    for each in folders:
        each.mkdir()
    records = [
        json.dumps({"text": text[i : i + DOCUMENT_CHARACTERS]}) + "\n"
        for i in range(0, len(text), DOCUMENT_CHARACTERS)
    ]
    (folders[1] / "all.jsonl").write_text("".join(records))
    with open(folder / "all", "w") as whole:
        for number in range(NUM_FILES):
            (folders[0] / f"{number}.txt").write_text(text)
            whole.write(text)
    return folders
