from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.config import DataConfig
from data_tools.corpus import overlap
from data_tools.loading.builders import build_eval_batches, build_train_loader, data_warnings
from data_tools.sampling.curriculum import plan_curriculum
from tests.data_tools.corpora import write_corpus

_DOCUMENTS = [
    np.random.default_rng(seed).integers(1, 200, size=64 + seed % 50) for seed in range(300)
]
_TEXTS = ["".join(chr(97 + i % 26) for i in ids) for ids in _DOCUMENTS]


def _warnings(folder: Path, *, steps: int = 1, **data: Any) -> list[str]:
    values = {"train": str(folder / "train"), "validation": str(folder / "held"), "num_workers": 0}
    config = DataConfig.model_validate({"sequence_length": 32, **values, **data})
    layout = {"micro_batch_size": 2, "data_rank": 0, "data_size": 1, "vocab_size": 257}
    curriculum = plan_curriculum(config, sequences_per_step=2, max_steps=steps, max_tokens=None)
    loader = build_train_loader(config, sequence_length=32, seed=0, curriculum=curriculum, **layout)
    held_out = build_eval_batches(config, sequence_length=32, **layout)
    return data_warnings(config, curriculum, loader, held_out)


def _write(folder: Path, kind: str, name: str, documents: range) -> dict[str, Any]:
    """Documents of one corpus in a form that a run reads; what its data section says of it."""
    if kind == "tokens":
        write_corpus(folder / name, [_DOCUMENTS[i] for i in documents], vocab_size=257)
        return {}
    texts = [_TEXTS[i] for i in documents]
    if kind == "files":
        (folder / name).mkdir()
        for i, text in zip(documents, texts, strict=True):
            (folder / name / f"{name}_{i}.txt").write_text(text)
    elif kind == "blank lines":
        (folder / name).write_text("\n\n".join(texts))
        return {"kind": "bytes", "documents": "blank_line"}
    else:
        (folder / name).mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / name / "part.jsonl").write_text(lines)
        return {"kind": "bytes", "documents": "jsonl", "cache_dir": str(folder / "cache")}
    return {"kind": "bytes"}


KINDS = ("tokens", "files", "blank lines", "jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_documents_in_the_training_text_are_reported(kind: str, tmp_path: Path) -> None:
    """7 of the 20 held-out documents are in the training text; the last of a text of blank lines
    has no newline after it, so that it is another document in the middle of a text."""
    data = _write(tmp_path, kind, "train", range(200))
    _write(tmp_path, kind, "held", range(193, 213))
    (warning,) = _warnings(tmp_path, **data)
    found = 6 if kind == "blank lines" else 7
    assert f"data.validation source held: {found} of 20 sampled documents are also in" in warning
    assert "data.train source train, so that its loss will be too low; remove them" in warning


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_shared_documents_gives_no_warning(kind: str, tmp_path: Path) -> None:
    data = _write(tmp_path, kind, "train", range(200))
    _write(tmp_path, kind, "held", range(200, 300))  # of the same lengths
    assert _warnings(tmp_path, **data) == []


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_text_that_is_the_training_text_is_reported_by_fingerprint(
    kind: str, tmp_path: Path
) -> None:
    data = _write(tmp_path, kind, "train", range(20))
    (warning,) = _warnings(tmp_path, validation=str(tmp_path / "train"), **data)
    assert "source train is the text of data.train source train (the same fingerprint)" in warning


def test_documents_that_differ_only_in_the_middle_count_as_equal(tmp_path: Path) -> None:
    """What is compared is said: the length and both ends."""
    long = np.random.default_rng(0).integers(1, 200, size=1000)
    other = long.copy()
    other[500] += 1
    write_corpus(tmp_path / "train", [long, *_DOCUMENTS[:9]], vocab_size=257)
    write_corpus(tmp_path / "held", [other, _DOCUMENTS[20]], vocab_size=257)
    assert len(_warnings(tmp_path)) == 1
    other[3] += 1
    write_corpus(tmp_path / "held2", [other, _DOCUMENTS[20]], vocab_size=257)
    assert _warnings(tmp_path, validation=str(tmp_path / "held2")) == []


def test_short_documents_are_not_searched_for(tmp_path: Path) -> None:
    short = [ids[:63] for ids in _DOCUMENTS]
    write_corpus(tmp_path / "train", [*short[:40], _DOCUMENTS[0]], vocab_size=257)
    write_corpus(tmp_path / "held", short[:40], vocab_size=257)
    assert _warnings(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_only_part_of_a_large_corpus_is_searched(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 512 tokens spread over 17,000 tokens: some of the 200 documents, not all."""
    monkeypatch.setattr(overlap, "_BLOCKS", 8)
    for name in ("_MAX_INDEXED_TOKENS", "_MAX_SCANNED_TOKENS"):
        monkeypatch.setattr(overlap, name, 8 * 512)
    data = _write(tmp_path, kind, "train", range(200))
    _write(tmp_path, kind, "held", range(0, 200, 4))
    (warning,) = _warnings(tmp_path, **data)
    found = int(warning.split("source held: ")[1].split()[0])
    assert 2 <= found <= 30


def test_a_source_read_too_often_is_reported(tmp_path: Path) -> None:
    write_corpus(tmp_path / "train", _DOCUMENTS[:20], vocab_size=257)
    write_corpus(tmp_path / "held", _DOCUMENTS[20:30], vocab_size=257)
    windows = (sum(map(len, _DOCUMENTS[:20])) - 1) // 32
    assert _warnings(tmp_path, steps=4 * windows // 2) == []
    steps = 4 * windows // 2 + 1
    (warning,) = _warnings(tmp_path, steps=steps)
    times = f"{2 * steps / windows:.3g}"
    assert f"source train: the run reads it {times} times, more than data.warn_epochs=4;" in warning
    assert _warnings(tmp_path, steps=steps, warn_epochs=5.0) == []
