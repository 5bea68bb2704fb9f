from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.config import DataConfig
from data_tools.corpus.corpus_info import TextRules
from data_tools.errors import DataError
from data_tools.loading.builders import build_eval_batches, build_train_loader
from data_tools.loading.loader import TrainLoader
from data_tools.loading.sources import open_sources, read_text_rules
from tests.data_tools.corpora import counting_documents, write_corpus, write_counting_corpus
from tests.data_tools.tokenization.tokenizer_folders import byte_level
from tests.refusals import assert_refused


def _loader(section: dict[str, Any], *, vocab_size: int = 1 << 20) -> TrainLoader:
    config = DataConfig.model_validate({"sequence_length": 8, **section})
    return build_train_loader(
        config,
        sequence_length=config.sequence_length,
        micro_batch_size=4,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=vocab_size,
    )


_refused = partial(assert_refused, error=DataError)


def test_ids_that_occur_must_fit_the_model_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path / "c", counting_documents([50]), vocab_size=100)
    with _refused(
        "source c", value=49, constraint="model.vocab_size", remedy="model.vocab_size to 50"
    ):
        _loader({"train": str(tmp_path / "c")}, vocab_size=49)
    for vocab_size in (100, 50):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING),
            _loader({"train": str(tmp_path / "c")}, vocab_size=vocab_size) as loader,
        ):
            assert next(loader).tokens.shape == (4, 8)
        said = "source c: its tokenizer has 100 ids, model.vocab_size is 50" in caplog.text
        assert said == (vocab_size == 50)


def _rules(folder: Path, *names: str, **settings: object) -> TextRules:
    paths = [str(folder / name) for name in names]
    section = {"train": paths[0], "validation": paths[1:], "sequence_length": 8, **settings}
    return read_text_rules(DataConfig.model_validate(section))


def test_rules_of_a_run_are_those_that_its_corpora_share(tmp_path: Path) -> None:
    marks = {"eod_id": 3, "bos_ids": (1, 2)}
    write_corpus(tmp_path / "a", counting_documents([50]), **marks)
    write_corpus(tmp_path / "b", counting_documents([50]), special_tokens="parse", **marks)
    write_corpus(tmp_path / "foreign", counting_documents([50]))
    (tmp_path / "foreign.json").unlink()
    assert _rules(tmp_path, "a") == (3, (1, 2), "plain")
    assert _rules(tmp_path, "a", "b") == (3, (1, 2), "parse")
    assert _rules(tmp_path, "a", "foreign") == (3, (1, 2), "plain")
    assert _rules(tmp_path, "foreign") == (None, None, None)
    assert _rules(tmp_path, "a", kind="bytes") == (256, (), "plain")


def test_corpora_whose_documents_begin_or_end_differently_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", counting_documents([50]), eod_id=3)
    write_corpus(tmp_path / "other", counting_documents([50]), eod_id=4)
    write_corpus(tmp_path / "begun", counting_documents([50]), eod_id=3, bos_ids=(1,))
    write_corpus(tmp_path / "endless", counting_documents([50]))
    for name, value, constraint, remedy in (
        ("other", 4, ("end", "source a with id 3"), "preprocess"),
        ("begun", 1, ("begin", "source a with no"), "preprocess"),
        ("endless", "no", ("end", "source a with id 3"), ("preprocess", "data.eod=3")),
    ):
        section = {"train": [str(tmp_path / "a"), str(tmp_path / name)]}
        with _refused(f"source {name}", value=value, constraint=constraint, remedy=remedy):
            _loader(section)
    # Whoever names the end token says that the text of the corpus holds it.
    assert _rules(tmp_path, "a", "endless", eod=3).eod_id == 3
    with _refused("source a", value=3, constraint="data.eod with id 4", remedy="data.eod"):
        _rules(tmp_path, "a", eod=4)


def test_end_token_of_a_foreign_corpus_is_what_the_run_says(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([50]))
    (tmp_path / "c.json").unlink()
    tokenizer = byte_level(tmp_path / "t", ["<|doc|>"])
    for eod, settings in ((7, {}), ("<|doc|>", {"tokenizer": str(tokenizer)})):
        config = DataConfig.model_validate(
            {"train": str(tmp_path / "c"), "sequence_length": 8, "eod": eod, **settings}
        )
        expected = 7 if eod == 7 else 300
        assert read_text_rules(config).eod_id == expected
        [source] = open_sources(config, config.train, vocab_size=400)
        assert source.stream.eod_id == expected
    with _refused("data.eod", value="<no>", constraint=f"data.tokenizer={tokenizer}", remedy="id"):
        _rules(tmp_path, "c", eod="<no>", tokenizer=str(tokenizer))
    with _refused("data.eod", value="<no>", constraint="tokenizer", remedy="data.tokenizer"):
        _rules(tmp_path, "c", eod="<no>")
    with assert_refused("data.eod", value=7, constraint="data.kind=bytes", remedy="remove"):
        _rules(tmp_path, "c", eod=7, kind="bytes")


def test_ids_of_a_foreign_corpus_are_probed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = write_counting_corpus(tmp_path / "c", 50)
    prefix.with_suffix(".json").unlink()
    with caplog.at_level(logging.WARNING):
        _loader({"train": str(prefix)}, vocab_size=50)
    assert "c.bin: no c.json beside it" in caplog.text
    with _refused(
        "source c", value=49, constraint="model.vocab_size 49", remedy="model.vocab_size"
    ):
        _loader({"train": str(prefix)}, vocab_size=49)
    np.memmap(tmp_path / "c.bin", dtype=np.int32, mode="r+")[7] = -3
    with _refused(
        "source c", value=-3, constraint="model.vocab_size 50", remedy="model.vocab_size"
    ):
        _loader({"train": str(prefix)}, vocab_size=50)


def test_sources_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, fingerprint in (("a", "1" * 64), ("b", "2" * 64)):
        write_corpus(tmp_path / name, counting_documents([50]), tokenizer_fingerprint=fingerprint)
    for section in (
        {"train": [str(tmp_path / "a"), str(tmp_path / "b")]},
        {"train": str(tmp_path / "a"), "validation": str(tmp_path / "b")},
    ):
        with _refused(
            "source b",
            value="222222222222",
            constraint=("tokenizer", "source a", "111111111111"),
            remedy="preprocess",
        ):
            _loader(section)


def test_tokenizer_of_the_run_must_be_the_tokenizer_of_the_data(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([50]), tokenizer_fingerprint="bytes")
    with _loader({"train": str(tmp_path / "c"), "tokenizer": "bytes"}) as loader:
        next(loader)
    other = tmp_path / "other.model"
    other.write_bytes(b"another tokenizer")
    with _refused("source c", value="bytes", constraint="data.tokenizer", remedy="preprocess"):
        _loader({"train": str(tmp_path / "c"), "tokenizer": str(other)})
    missing = tmp_path / "missing.model"
    with _refused("data.tokenizer", value=missing, constraint="no such file", remedy="bytes"):
        _loader({"train": str(tmp_path / "c"), "tokenizer": str(tmp_path / "missing.model")})


@pytest.mark.parametrize("kind", ["tokens", "bytes"])
def test_missing_source_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "missing"
    with _refused("data.train", value=path, constraint="no such file", remedy="path"):
        _loader({"train": str(path), "kind": kind})


@pytest.mark.parametrize("kind", ["tokens", "bytes"])
def test_source_shorter_than_a_window_is_refused(tmp_path: Path, kind: str) -> None:
    write_corpus(tmp_path / "c", counting_documents([8]))
    (tmp_path / "file").write_bytes(b"1234567")  # and the end token
    path = tmp_path / ("c" if kind == "tokens" else "file")
    constraint = ("sequence_length 8", "9")
    with _refused("data source", value=8, constraint=constraint, remedy="add text"):
        _loader({"train": str(path), "kind": kind})


def test_bytes_are_trained_on_without_preprocessing(tmp_path: Path) -> None:
    text = "raw text, read as it is: \u00e9\n".encode() * 20
    (tmp_path / "file.txt").write_bytes(text)
    stream = np.array([*text, 256])
    section = {"train": str(tmp_path / "*.txt"), "kind": "bytes", "reset_at_documents": True}
    with _loader(section, vocab_size=257) as loader:
        batch = next(loader)
        for row, label in zip(batch.tokens, batch.labels, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(stream, 9)
            expected = np.concatenate([row.numpy(), label[-1:].numpy()])
            assert (windows == expected).all(axis=1).any()
        assert batch.segment_ids is not None
    config = DataConfig.model_validate(
        {**section, "validation": str(tmp_path), "sequence_length": 8}
    )
    held_out = build_eval_batches(
        config,
        sequence_length=8,
        micro_batch_size=4,
        data_rank=0,
        data_size=1,
        vocab_size=257,
    )
    assert held_out.num_tokens == len(stream) - 1
    assert held_out.num_bytes == round(len(text) * (len(stream) - 1) / len(stream))
    labels = torch.cat([batch.labels.flatten() for batch in held_out])
    assert labels[labels != -100].tolist() == stream[1:].tolist()


@pytest.mark.parametrize("documents", ["blank_line", "jsonl"])
def test_documents_inside_files_are_kept_apart(tmp_path: Path, documents: str) -> None:
    texts = [f"document {i} " * (3 + i) for i in range(20)]
    if documents == "jsonl":
        lines = "".join(json.dumps({"content": text}) + "\n" for text in texts)
        (tmp_path / "a.jsonl").write_text(lines)
        (tmp_path / "notes.txt").write_text("not a jsonl file: left out of a directory")
        changes = {"json_key": "content"}
        separator = 1
    else:
        (tmp_path / "a.txt").write_text("\n\n".join(texts))
        changes = {}
        separator = 2
    section = {
        "train": str(tmp_path),
        "validation": str(tmp_path),
        "kind": "bytes",
        "documents": documents,
        "reset_at_documents": True,
        "sequence_length": 64,
        **changes,
    }
    config = DataConfig.model_validate(section)
    held_out = build_eval_batches(
        config, sequence_length=64, micro_batch_size=4, data_rank=0, data_size=1, vocab_size=257
    )
    total = sum(map(len, texts)) + separator * (len(texts) - 1) + 1
    assert held_out.num_tokens == total - len(texts)  # but the first token of each
    assert sum(int((batch.labels != -100).sum()) for batch in held_out) == held_out.num_tokens
    with _loader(section, vocab_size=257) as loader:
        batch = next(loader)
    assert batch.segment_ids is not None
    ends = batch.tokens[:, :-1] == 256
    assert ends.any()
    assert torch.equal(batch.segment_ids.diff(dim=1) == 1, ends)


def test_a_source_that_vanished_between_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    section = {"train": str(tmp_path / "file"), "kind": "bytes"}
    with _loader(section, vocab_size=257) as loader:
        next(loader)
        state = loader.state_dict()
    (tmp_path / "file").write_bytes(bytes(99) + b"x")
    with _refused("source", value="file", constraint="checkpoint", remedy=("restore", "name")):
        _loader(section, vocab_size=257).load_state_dict(state)
    (tmp_path / "file").unlink()
    gone = tmp_path / "file"
    with _refused("data.train", value=gone, constraint="no such file", remedy="path"):
        _loader(section, vocab_size=257)


def test_byte_vocabulary_without_room_for_the_end_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with _refused("model.vocab_size", value=256, constraint="data.kind bytes", remedy="257"):
        _loader({"train": str(tmp_path / "file"), "kind": "bytes"}, vocab_size=256)
