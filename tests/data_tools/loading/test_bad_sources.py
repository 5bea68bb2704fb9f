"""Sources that are damaged, swapped, gone or larger than 32 bits, as a run meets them."""

from __future__ import annotations

import shutil
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.config import DataConfig
from data_tools.corpus.indexed import HEADER, MAGIC, IndexedDataset, IndexedStream
from data_tools.errors import DataError
from data_tools.loading.builders import build_eval_batches, build_train_loader
from data_tools.loading.loader import TrainLoader
from data_tools.sampling.token_dataset import TokenDataset
from data_tools.verify import verify
from tests.data_tools.corpora import counting_documents, write_corpus, write_counting_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def _loader(path: Path, **changes: Any) -> TrainLoader:
    config = DataConfig.model_validate({"train": str(path), "sequence_length": 8})
    return build_train_loader(
        config,
        sequence_length=8,
        micro_batch_size=4,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=1 << 20,
        **changes,
    )


def test_index_of_another_corpus_is_refused(tmp_path: Path) -> None:
    a = write_counting_corpus(tmp_path / "a", 500)
    b = write_counting_corpus(tmp_path / "b", 600)
    shutil.copy(b.with_suffix(".idx"), a.with_suffix(".idx"))
    constraint = ("2400", "a.idx")
    with _refused("a.bin", value=2000, constraint=constraint, remedy="preprocess"):
        _loader(a)


def test_index_of_another_corpus_of_the_same_size_is_found_by_verify(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", counting_documents([100, 200]))
    write_corpus(tmp_path / "b", counting_documents([150, 150]))
    shutil.copy(tmp_path / "b.idx", tmp_path / "a.idx")
    found = sha256((tmp_path / "b.idx").read_bytes()).hexdigest()
    with _refused("a.idx", value=found, constraint="SHA-256", remedy="preprocess"):
        verify(str(tmp_path / "a"))


@pytest.mark.parametrize("size", [0, 1, 999, 1999])
def test_truncated_tokens_are_refused(tmp_path: Path, size: int) -> None:
    prefix = write_counting_corpus(tmp_path / "c", 500)
    with open(prefix.with_suffix(".bin"), "r+b") as file:
        file.truncate(size)
    value, constraint = (size, "2000") if size else ("empty", ())
    with _refused("c.bin", value=value, constraint=constraint, remedy="preprocess"):
        _loader(prefix)


def test_source_that_is_gone_at_a_resume_is_refused(tmp_path: Path) -> None:
    prefix = write_counting_corpus(tmp_path / "c", 500)
    with _loader(prefix) as loader:
        next(loader)
        state = loader.state_dict()
    prefix.with_suffix(".bin").unlink()
    path = prefix.with_suffix(".bin")
    with _refused("data.train", value=path, constraint="no such file", remedy="path"):
        _loader(prefix, state=state)


def test_contents_that_changed_before_a_resume_are_refused(tmp_path: Path) -> None:
    prefix = write_counting_corpus(tmp_path / "c", 500)
    with _loader(prefix) as loader:
        next(loader)
        state = loader.state_dict()
    np.memmap(prefix.with_suffix(".bin"), dtype=np.int32, mode="r+")[300] = 7
    with _refused("source", value="c", constraint="checkpoint", remedy=("restore", "name")):
        _loader(prefix, state=state)


def _write_sparse(prefix: Path, lengths: list[int]) -> None:
    """A .bin of holes in the file, and its index."""
    with open(prefix.with_suffix(".bin"), "wb") as file:
        file.truncate(2 * sum(lengths))
    ends = np.cumsum(lengths)
    with open(prefix.with_suffix(".idx"), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, len(lengths), len(lengths) + 1))
        file.write(np.array(lengths, dtype="<i4").tobytes())
        file.write((2 * (ends - lengths)).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def test_positions_beyond_two_to_the_31_tokens_are_read(tmp_path: Path) -> None:
    lengths = [1_500_000_000, 1_000_000_000, 500_000_000]
    _write_sparse(tmp_path / "c", lengths)
    total = sum(lengths)
    tokens = np.memmap(tmp_path / "c.bin", dtype=np.uint16, mode="r+")
    tokens[-9:] = np.arange(1, 10)
    stream = IndexedStream(IndexedDataset(tmp_path / "c"))
    assert stream.read(np.array([total - 9]), 9)[0].tolist() == list(range(1, 10))
    assert stream.document_at(total - 1) == (2_500_000_000, total)
    begin = 2_500_000_000 - 5
    assert [p.tolist() for p in stream.document_starts(np.array([begin]), 10)] == [[begin + 5]]
    dataset = TokenDataset(stream, name="c", sequence_length=8, seed=0, reset_at_documents=True)
    epochs = 3 * dataset.num_windows * 8
    locations = dataset.locate(np.arange(epochs, epochs + 8000, 8))
    assert set(locations.epochs.tolist()) == {3}
    assert (locations.starts > 1 << 31).any()
    assert locations.starts.min() >= 0
    assert locations.starts.max() <= total - 9
    assert dataset.read(locations, length=8).ids.shape == (1000, 9)


def test_a_run_of_more_than_two_to_the_31_samples_keeps_its_ledger(tmp_path: Path) -> None:
    prefix = write_counting_corpus(tmp_path / "c", 500)
    with _loader(prefix, consumed_samples=1 << 40) as loader:
        assert next(loader).tokens.shape == (4, 8)
        state = loader.state_dict()
    assert state["consumed_samples"] == (1 << 40) + 4
    assert state["sources"]["c"]["tokens"] == 8 * ((1 << 40) + 4)
    with _loader(prefix, state=state) as resumed, _loader(prefix, consumed_samples=1 << 40) as all_:
        next(all_)
        assert next(resumed).tokens.tolist() == next(all_).tokens.tolist()


def test_a_relative_path_that_leads_nowhere_names_its_option_and_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "good", [np.arange(100)])
    monkeypatch.chdir(tmp_path)
    layout = {"sequence_length": 8, "micro_batch_size": 1, "data_rank": 0, "data_size": 1}
    sizes = {**layout, "vocab_size": 1 << 20}
    where = str(tmp_path)

    def config(**data: Any) -> DataConfig:
        return DataConfig.model_validate({"train": "good", "sequence_length": 8, **data})

    with _refused("data.train", value="data/mine.idx", constraint=where, remedy="path"):
        build_train_loader(config(train="data/mine"), seed=0, **sizes)
    with _refused("data.validation", value="held.idx", constraint=where, remedy="path"):
        build_eval_batches(config(validation="held"), **sizes)
    with _refused("data.train", value="*.txt", constraint=where, remedy="path"):
        build_train_loader(config(train="*.txt", kind="bytes"), seed=0, **sizes)
    with _refused("data.tokenizer", value="t.json", constraint=where, remedy="`bytes`"):
        build_train_loader(config(tokenizer="t.json"), seed=0, **sizes)
    with _refused("data.train", value="/nowhere.idx", constraint="no such file", remedy="path"):
        build_train_loader(config(train="/nowhere"), seed=0, **sizes)
