"""No number is stored as another: ids, lengths and offsets fit, or the place is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_tools.config import DataConfig
from data_tools.corpus.corpus_info import read_info
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, smallest_dtype
from data_tools.errors import DataError
from data_tools.loading.builders import build_train_loader
from data_tools.loading.loader import TrainLoader
from data_tools.merge import merge
from data_tools.split import split
from tests.data_tools.corpora import write_corpus
from tests.hostile.commands import data_tool, fault_of_refusal
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

WIDEST = {"uint8": 1 << 8, "uint16": 1 << 16, "int32": 1 << 31, "int64": 1 << 62}


@pytest.mark.parametrize("dtype", WIDEST)
def test_the_largest_vocabulary_of_a_dtype_fits_and_one_more_takes_the_next(
    dtype: str, tmp_path: Path
) -> None:
    vocab_size = WIDEST[dtype]
    assert smallest_dtype(vocab_size).name == dtype
    assert dtype == "int64" or smallest_dtype(vocab_size + 1).name != dtype
    edges = [0, 1, vocab_size // 2, vocab_size - 1]
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=vocab_size) as writer:
        writer.add_document(np.array(edges))
        writer.finish(
            tokenizer="t", tokenizer_fingerprint="f", eod_id=None, num_bytes=1, command=""
        )
    assert IndexedDataset(tmp_path / "c").document(0).tolist() == edges


def test_ids_of_any_dtype_come_back_as_they_were_or_are_refused(tmp_path: Path) -> None:
    """Of every size of vocabulary, and given in every integer dtype that NumPy has."""
    draw = random.Random(0)
    wraps = refused = 0
    for number in range(200):
        vocab_size = draw.choice(list(WIDEST.values())) + draw.randint(-1, 1)
        given = np.dtype(draw.choice(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]))
        info = np.iinfo(given)
        around = draw.choice([0, vocab_size, 70_000, 2**16, 2**31, 2**32, 2**63])
        value = min(max(around + draw.randint(-2, 2), int(info.min)), int(info.max))
        error = _written(tmp_path / str(number), np.array([0, value], dtype=given), vocab_size)
        if error is not None:
            refused += 1
            assert f"token id {value} at token 1 of document 1" in error
            assert not 0 <= value < vocab_size
            assert list(tmp_path.glob(f"{number}.*")) == []
            continue
        wraps += IndexedDataset(tmp_path / str(number)).document(1).tolist() != [0, value]
        assert 0 <= value < vocab_size
    print(f"200 ids: {refused} refused, {wraps} stored as another")
    assert wraps == 0
    assert 20 < refused < 180


def _written(prefix: Path, ids: np.ndarray, vocab_size: int) -> str | None:
    """Why a corpus with a document of these ids cannot be written; None when it is."""
    try:
        with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
            writer.add_document(np.zeros(3, dtype=np.int64))
            writer.add_document(ids)
            writer.finish(
                tokenizer="t", tokenizer_fingerprint="f", eod_id=None, num_bytes=1, command=""
            )
    except DataError as error:
        return str(error)
    return None


def _lie(prefix: Path, **changes: object) -> None:
    """A sidecar of a vocabulary that its corpus is not of."""
    info = read_info(prefix)
    assert info is not None
    prefix.with_suffix(".json").write_bytes(info.model_copy(update=changes).to_bytes())


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: merge([str(folder / "a"), str(folder / "b")], str(folder / "out")),
        lambda folder: split(
            str(folder / "a"), str(folder / "out1"), str(folder / "out2"), share=0.5
        ),
    ],
    ids=["merge", "split"],
)
def test_token_70000_of_a_corpus_that_says_uint16_is_refused(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        rows = [np.arange(5), np.array([1, 2, 70_000, 3])]
        write_corpus(tmp_path / name, rows, vocab_size=80_000)
        _lie(
            tmp_path / name,
            vocab_size=60_000,
            tokenizer="bytes",
            tokenizer_fingerprint="bytes",
        )
    with _refused(
        "token id", value=70000, constraint=("token 2", "60000"), remedy="vocabulary size"
    ):
        write(tmp_path)
    assert not list(tmp_path.glob("out*.bin"))


def test_token_70000_of_a_tokenizer_is_kept_or_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "</s>": 2}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("a b a")
    arguments = (
        "--input",
        str(tmp_path / "in.txt"),
        "--tokenizer",
        str(tmp_path / "tokenizer.json"),
    )
    arguments += ("--workers", "1", "--output", str(tmp_path / "out"))
    assert fault_of_refusal(data_tool("preprocess", *arguments, "--vocab-size", "65536")) is None
    assert data_tool("preprocess", *arguments).code == 0
    assert IndexedDataset(tmp_path / "out").document(0).tolist() == [0, 70_000, 0, 2]


def test_a_document_of_two_to_the_31_tokens_is_refused_by_its_number(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=2) as writer:
        writer.add_document(np.zeros(3, dtype=np.uint8))
        ids = np.broadcast_to(np.uint8(1), 1 << 31)  # of one byte
        with _refused("document", value=2, constraint=("2147483648", "2147483647"), remedy="split"):
            writer.add_documents(ids, np.array([0, 1 << 31]))


def _loader(prefix: Path, *, vocab_size: int, sequence_length: int = 8) -> TrainLoader:
    config = DataConfig.model_validate(
        {"train": str(prefix), "sequence_length": sequence_length, "num_workers": 0}
    )
    return build_train_loader(
        config,
        sequence_length=sequence_length,
        micro_batch_size=2,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=vocab_size,
    )


def test_ids_beyond_the_models_vocabulary_are_refused_before_the_first_step(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [np.arange(500)], vocab_size=500)
    with pytest.raises(DataError, match=r"500.*499|499.*500|vocab"):
        _loader(tmp_path / "c", vocab_size=499)
    # Without the sidecar nobody has looked at all ids: those of a batch are, when it is read.
    (tmp_path / "c.json").unlink()
    with _refused(
        "source c", value=499, constraint="model.vocab_size 400", remedy="model.vocab_size"
    ):
        list(islice(_loader(tmp_path / "c", vocab_size=400), 60))
    outcome = data_tool("verify", str(tmp_path / "c"), "--vocab-size", "400")
    assert "id 400 at token 400 of document 0" in outcome.err


@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**40, 2**62])
def test_a_sequence_longer_than_the_corpus_is_refused_and_takes_no_memory(
    length: int, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "c", [np.arange(500)], vocab_size=500)
    with pytest.raises(DataError, match="sequence_length"):
        _loader(tmp_path / "c", vocab_size=500, sequence_length=length)
