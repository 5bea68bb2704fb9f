from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset, IndexedStream
from data_tools.errors import DataError
from data_tools.sampling.token_dataset import TokenDataset, read_windows
from tests.data_tools.corpora import counting_documents, write_corpus, write_counting_corpus
from tests.refusals import assert_refused


def _dataset(prefix: Path, sequence_length: int, **changes: object) -> TokenDataset:
    settings = {"name": "c", "seed": 0, "reset_at_documents": False, **changes}
    stream = IndexedStream(IndexedDataset(prefix))
    return TokenDataset(stream, sequence_length=sequence_length, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [101, 105, 110])
def test_an_epoch_predicts_every_token_that_fits_once(tmp_path: Path, num_tokens: int) -> None:
    dataset = _dataset(write_counting_corpus(tmp_path / "c", num_tokens), 10)
    assert dataset.num_windows == 10
    windows = dataset.read(dataset.locate(10 * np.arange(dataset.num_windows)), length=10).ids
    assert windows.shape == (10, 11)
    assert not np.array_equal(windows, np.sort(windows, axis=0))  # shuffled
    assert np.array_equal(windows, windows[:, :1] + np.arange(11))  # consecutive tokens
    assert np.array_equal(np.sort(windows[:, 1:].ravel()), np.arange(1, 101))


def test_epochs_have_different_orders_of_the_same_windows(tmp_path: Path) -> None:
    dataset = _dataset(write_counting_corpus(tmp_path / "c", 501), 5)
    orders = dataset.window_numbers(np.arange(300)).reshape(3, 100)
    assert np.array_equal(np.sort(orders), np.broadcast_to(np.arange(100), (3, 100)))
    assert len({order.tobytes() for order in orders}) == 3


def test_samples_asked_for_together_equal_samples_asked_for_one_by_one(tmp_path: Path) -> None:
    dataset = _dataset(write_counting_corpus(tmp_path / "c", 101), 7, reset_at_documents=True)
    numbers = np.array([40, 3, 13, 14, 3])  # over several epochs, one of them twice
    together = dataset.read(dataset.locate(7 * numbers), length=7)
    assert together.segment_ids is not None
    for row, number in enumerate(numbers):
        alone = dataset.read(dataset.locate(np.array([7 * number])), length=7)
        assert alone.segment_ids is not None
        assert np.array_equal(together.ids[row], alone.ids[0])
        assert np.array_equal(together.segment_ids[row], alone.segment_ids[0])


def test_segment_ids_number_the_documents_of_a_window(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([3, 1, 2, 10]))
    stream = IndexedStream(IndexedDataset(tmp_path / "c"))
    windows = read_windows(stream, starts=np.array([0, 2, 8]), length=8, with_segments=True)
    assert windows.segment_ids is not None
    assert windows.segment_ids.dtype == np.int32
    assert windows.segment_ids.tolist() == [
        [0, 0, 0, 1, 2, 2, 3, 3],
        [0, 1, 2, 2, 3, 3, 3, 3],
        [0] * 8,
    ]


@pytest.mark.parametrize("num_tokens", [1, 10])
def test_corpus_shorter_than_a_window_is_refused_with_numbers(
    tmp_path: Path, num_tokens: int
) -> None:
    prefix = write_counting_corpus(tmp_path / "c", num_tokens)
    constraint = ("sequence_length 10", "11")
    with assert_refused("source c", num_tokens, constraint, remedy="shorten", error=DataError):
        _dataset(prefix, 10)


def test_seed_and_name_change_the_order_and_the_folder_does_not(tmp_path: Path) -> None:
    prefix = write_counting_corpus(tmp_path / "here" / "c", 501)
    moved = write_counting_corpus(tmp_path / "there" / "c", 501)
    numbers = np.arange(50)
    order = _dataset(prefix, 5).window_numbers(numbers)
    assert np.array_equal(order, _dataset(moved, 5).window_numbers(numbers))
    assert not np.array_equal(order, _dataset(prefix, 5, seed=1).window_numbers(numbers))
    assert not np.array_equal(order, _dataset(prefix, 5, name="d").window_numbers(numbers))
