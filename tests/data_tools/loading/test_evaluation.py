from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.config import DataConfig
from data_tools.errors import DataError
from data_tools.loading.builders import build_eval_batches
from data_tools.loading.evaluation import EvalBatches
from tests.data_tools.corpora import counting_documents, write_corpus, write_counting_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def _batches(
    validation: list[Path], *, reset_at_documents: bool = False, **changes: Any
) -> EvalBatches:
    config = DataConfig.model_validate(
        {
            "train": "unused",
            "validation": [str(path) for path in validation],
            "sequence_length": 10,
            "reset_at_documents": reset_at_documents,
        }
    )
    layout = {
        "sequence_length": 10,
        "micro_batch_size": 3,
        "data_rank": 0,
        "data_size": 1,
        "vocab_size": 1 << 20,
    }
    return build_eval_batches(config, **(layout | changes))


@pytest.mark.parametrize("num_tokens", [2, 10, 11, 12, 101, 105])
@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_every_token_but_the_first_is_scored_once(
    tmp_path: Path, num_tokens: int, data_size: int
) -> None:
    prefix = write_counting_corpus(tmp_path / "v", num_tokens)
    ranks = [_batches([prefix], data_rank=r, data_size=data_size) for r in range(data_size)]
    scored = []
    for rank in ranks:
        batches = list(rank)
        assert len(batches) == len(rank) == len(ranks[0])
        for batch in batches:
            assert batch.tokens.shape == batch.labels.shape == (3, 10)
            mask = batch.labels != -100
            assert torch.equal(batch.labels[mask], batch.tokens[mask] + 1)
            scored += batch.labels[mask].tolist()
    assert sorted(scored) == list(range(1, num_tokens))
    assert all(rank.num_tokens == num_tokens - 1 for rank in ranks)


def test_sources_follow_each_other_and_batches_can_be_read_again(tmp_path: Path) -> None:
    prefixes = [
        write_counting_corpus(tmp_path / "v", 25),
        write_counting_corpus(tmp_path / "w", 32, first=1000),
    ]
    batches = _batches(prefixes)
    first, second = (
        [batch.labels[batch.labels != -100].tolist() for batch in batches] for _ in range(2)
    )
    assert first == second
    assert [label for labels in first for label in labels] == [*range(1, 25), *range(1001, 1032)]
    assert batches.num_tokens == 24 + 31


@pytest.mark.parametrize("reset_at_documents", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "jsonl"])
def test_characters_that_begin_at_scored_bytes_are_counted(
    tmp_path: Path, kind: str, reset_at_documents: bool
) -> None:
    """Against Python's own decoder: all but the first, and with resets those of every document."""
    texts = ["aşk çok güzel", "\u20ac 5, \U0001f600!"]
    for number, text in enumerate(texts):
        line = json.dumps({"text": text}) if kind == "jsonl" else text
        suffix = "jsonl" if kind == "jsonl" else "txt"
        (tmp_path / f"{number}.{suffix}").write_text(line, encoding="utf-8")
    config = DataConfig.model_validate(
        {
            "kind": "bytes",
            "documents": "jsonl" if kind == "jsonl" else "file",
            "train": "unused",
            "validation": str(tmp_path),
            "sequence_length": 7,
            "reset_at_documents": reset_at_documents,
        }
    )
    batches = build_eval_batches(
        config, sequence_length=7, micro_batch_size=2, data_rank=0, data_size=1, vocab_size=257
    )
    unscored = len(texts) if reset_at_documents else 1
    assert batches.num_characters == sum(map(len, texts)) - unscored


def test_characters_are_not_counted_where_tokens_are_no_bytes(tmp_path: Path) -> None:
    assert _batches([write_counting_corpus(tmp_path / "v", 25)]).num_characters is None


def test_windows_of_a_limited_evaluation_are_spread_over_the_text(tmp_path: Path) -> None:
    prefix = write_counting_corpus(tmp_path / "v", 1001)
    batches = _batches([prefix], max_windows=4)
    scored = torch.cat([batch.labels[batch.labels != -100] for batch in batches])
    assert scored.reshape(4, 10)[:, 0].tolist() == [1, 251, 501, 751]
    assert batches.num_tokens == 40
    assert _batches([prefix], max_windows=10**9).num_tokens == 1000


def test_bytes_are_those_of_the_scored_share_of_the_text(tmp_path: Path) -> None:
    write_corpus(tmp_path / "v", counting_documents([1001]), num_bytes=4004)
    write_corpus(tmp_path / "w", counting_documents([101]), num_bytes=1010)
    assert _batches([tmp_path / "v"]).num_bytes == 4000
    assert _batches([tmp_path / "v"], max_windows=10).num_bytes == 400
    assert _batches([tmp_path / "v", tmp_path / "w"]).num_bytes == 5000


def test_bytes_are_unknown_without_a_sidecar(tmp_path: Path) -> None:
    prefix = write_counting_corpus(tmp_path / "v", 100)
    prefix.with_suffix(".json").unlink()
    assert _batches([prefix]).num_bytes is None


@pytest.mark.parametrize("max_windows", [None, 7])
def test_first_tokens_of_documents_are_not_counted_when_kept_apart(
    tmp_path: Path, max_windows: int | None
) -> None:
    prefix = write_counting_corpus(tmp_path / "v", 500)
    batches = _batches([prefix], reset_at_documents=True, max_windows=max_windows)
    scored = 0
    for batch in batches:
        assert batch.segment_ids is not None
        assert (batch.labels[:, :-1][batch.segment_ids.diff(dim=1) != 0] == -100).all()
        scored += int((batch.labels != -100).sum())
    assert batches.num_tokens == scored
    assert scored < _batches([prefix], max_windows=max_windows).num_tokens


def test_evaluation_without_held_out_text_is_refused() -> None:
    with _refused("data.validation", value="empty", constraint="empty", remedy="text"):
        _batches([])


def test_held_out_text_without_a_token_to_score_is_refused(tmp_path: Path) -> None:
    with _refused("source v", value=1, constraint="2", remedy="add"):
        _batches([write_counting_corpus(tmp_path / "v", 1)])


def test_limit_below_one_window_is_refused(tmp_path: Path) -> None:
    with _refused("max_windows", value=0, constraint="1", remedy="raise"):
        _batches([write_counting_corpus(tmp_path / "v", 50)], max_windows=0)
