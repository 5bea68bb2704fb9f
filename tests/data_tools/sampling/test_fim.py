"""Fill-in-the-middle, taken apart again: every rearranged piece gives back the text it was."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_tools.config import DataConfig
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed import IndexedDataset, IndexedStream
from data_tools.errors import DataError
from data_tools.loading.builders import build_train_loader
from data_tools.loading.loader import TrainLoader
from data_tools.tokenization.byte_vocabulary import BYTE_EOD
from tests.data_tools.corpora import counting_documents, write_corpus
from tests.refusals import assert_refused

_PRE, _SUF, _MID = 2001, 2002, 2003
_IDS = {"prefix": _PRE, "suffix": _SUF, "middle": _MID}
_LENGTHS = [3, 1, 40, 7, 100, 25, 4, 2, 60, 31, 80, 5, 90, 64, 12]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token is its own position, so that a token says where it came from."""
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    write_corpus(prefix, counting_documents(_LENGTHS * 2), vocab_size=2004)
    return prefix


def _loader(
    path: Path, *, fim: dict[str, Any] | None = None, length: int = 50, **changes: Any
) -> TrainLoader:
    layout = {
        key: changes.pop(key, value)
        for key, value in (("micro_batch_size", 4), ("data_rank", 0), ("data_size", 1), ("seed", 1))
    }
    vocab_size = changes.pop("vocab_size", 2004)
    config = DataConfig.model_validate(
        {"train": str(path), "sequence_length": length, "num_workers": 0, "fim": fim, **changes}
    )
    return build_train_loader(
        config,
        sequence_length=length,
        micro_batches_per_step=1,
        vocab_size=vocab_size,
        **layout,
    )


def _windows(loader: TrainLoader, batches: int) -> list[list[int]]:
    """Samples with the token after them."""
    rows = []
    for _ in range(batches):
        batch = next(loader)
        rows += torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1).tolist()
    return rows


def _restored(piece: list[int]) -> list[int]:
    """The text of a rearranged piece, by cutting it at its sentinels."""
    if piece[:2] == [_PRE, _SUF]:
        middle = piece.index(_MID)
        return piece[middle + 1 :] + piece[2:middle]
    suffix, middle = piece.index(_SUF), piece.index(_MID)
    return piece[1:suffix] + piece[middle + 1 :] + piece[suffix + 1 : middle]


def _pieces(
    row: list[int], plain: list[int], bounds: set[int]
) -> list[tuple[list[int], list[int]]]:
    """The parts of a sample that lie in one document, rearranged and as they were."""
    cuts = [i for i in range(1, len(plain)) if plain[i] in bounds]
    return [(row[a:b], plain[a:b]) for a, b in itertools.pairwise([0, *cuts, len(plain)])]


@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_each_part_of_a_window_is_rearranged_in_its_place(corpus: Path, spm_rate: float) -> None:
    fim = {"rate": 0.7, "spm_rate": spm_rate, **_IDS}
    with _loader(corpus, fim=fim) as loader, _loader(corpus) as plain:
        rows, originals = _windows(loader, 60), _windows(plain, 60)
    bounds = set(np.cumsum(_LENGTHS * 2).tolist())
    counts = {"kept": 0, "changed": 0, "long": 0, "spm": 0, "short": 0}
    for row, original in zip(rows, originals, strict=True):
        for piece, text in _pieces(row, original, bounds):
            if piece == text:
                counts["short" if len(text) < 4 else "kept"] += 1
                continue
            assert _restored(piece) == text[:-3]
            counts["changed"] += 1
            if len(text) > 25:  # of a PSM piece the prefix may be empty, which then looks like SPM
                counts["long"] += 1
                counts["spm"] += piece[:2] == [_PRE, _SUF]
    share = counts["changed"] / (counts["changed"] + counts["kept"])
    assert share == pytest.approx(0.7, abs=0.06)
    assert counts["spm"] / counts["long"] == pytest.approx(spm_rate, abs=0.1)
    assert counts["short"] > 0


def test_cuts_are_uniform_over_the_text(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([2000]), vocab_size=2004)
    fim = {"rate": 1.0, "spm_rate": 0.0, **_IDS}
    with _loader(tmp_path / "c", fim=fim, length=43) as loader:
        rows = _windows(loader, 500)
    prefixes = np.array([row.index(_SUF) - 1 for row in rows])
    middles = np.array([len(row) - 1 - row.index(_MID) for row in rows])
    # The smaller of two uniform cuts of 41 tokens, and the distance between them: a third each.
    assert prefixes.mean() == pytest.approx(41 / 3, abs=1)
    assert middles.mean() == pytest.approx(41 / 3, abs=1)
    assert prefixes.min() == middles.min() == 0


def test_whole_documents_are_the_same_in_every_window_that_sees_a_part(corpus: Path) -> None:
    fim = {"rate": 0.8, "level": "document", **_IDS}
    total = sum(_LENGTHS) * 2
    stream = np.full(total, -1)
    for length in (50, 7, 300):  # windows of other lengths see other parts of the same documents
        with (
            _loader(corpus, fim=fim, length=length) as loader,
            _loader(corpus, length=length) as plain,
        ):
            one_epoch = (total - 1) // length // 4
            rows, originals = _windows(loader, one_epoch), _windows(plain, one_epoch)
        for row, original in zip(rows, originals, strict=True):
            seen = stream[original]
            assert ((seen == -1) | (seen == row)).all()
            stream[original] = row
    assert (stream != -1).mean() > 0.95
    ends = np.cumsum(_LENGTHS * 2)
    changed = 0
    for begin, end in zip(ends - _LENGTHS * 2, ends, strict=True):
        piece, text = stream[begin:end].tolist(), list(range(begin, end))
        if -1 in piece or piece == text:
            continue
        assert _restored(piece) == text[:-3]
        changed += 1
    assert changed > 10


def test_the_token_that_ends_a_document_stays_its_end(tmp_path: Path) -> None:
    documents = [np.append(part, 2000) for part in counting_documents([30] * 40)]
    info = write_corpus(tmp_path / "c", documents, vocab_size=2004)
    path = tmp_path / "c.json"
    path.write_bytes(info.model_copy(update={"eod_id": 2000}).to_bytes())
    assert CorpusInfo.model_validate_json(path.read_text()).eod_id == 2000
    fim = {"rate": 1.0, "level": "document", **_IDS}
    with (
        _loader(tmp_path / "c", fim=fim, length=31) as loader,
        _loader(tmp_path / "c", length=31) as plain,
    ):
        for row, original in zip(_windows(loader, 9), _windows(plain, 9), strict=True):
            assert [i for i, t in enumerate(row) if t == 2000] == [
                i for i, t in enumerate(original) if t == 2000
            ]


@pytest.mark.parametrize("level", ["document", "window"])
def test_the_tokens_that_begin_a_document_stay_its_begin(tmp_path: Path, level: str) -> None:
    marks = (1998, 1999)
    documents = [np.concatenate((marks, part)) for part in counting_documents([28] * 40)]
    write_corpus(tmp_path / "c", documents, vocab_size=2004, bos_ids=marks)
    fim = {"rate": 1.0, "level": level, **_IDS}
    with (
        _loader(tmp_path / "c", fim=fim, length=31) as loader,
        _loader(tmp_path / "c", length=31) as plain,
    ):
        changed = 0
        for row, original in zip(_windows(loader, 9), _windows(plain, 9), strict=True):
            for mark in marks:
                places = [i for i, token in enumerate(original) if token == mark]
                assert [i for i, token in enumerate(row) if token == mark] == places
            changed += row != original
    assert changed > 20


@pytest.mark.parametrize("level", ["document", "window"])
@pytest.mark.parametrize("documents", ["file", "blank_line", "jsonl"])
def test_byte_sources_are_rearranged_too(tmp_path: Path, documents: str, level: str) -> None:
    texts = ["The first document. " * 5, "Another, of one word more. " * 7, "Short one."] * 4
    for number in range(3):
        if documents == "jsonl":
            content = "".join(f'{{"text": "{text}"}}\n' for text in texts)
        else:
            content = "\n\n".join(texts)
        (tmp_path / f"{number}.jsonl").write_text(content)
    fim = {"rate": 1.0, "level": level, "prefix": 257, "suffix": 258, "middle": 259}
    changes = {"kind": "bytes", "documents": documents, "vocab_size": 260, "length": 64}
    with _loader(tmp_path, fim=fim, **changes) as loader, _loader(tmp_path, **changes) as plain:
        rows, originals = _windows(loader, 10), _windows(plain, 10)
    marks = sum(token > 256 for row in rows for token in row)
    assert marks >= 3
    for row, original in zip(rows, originals, strict=True):
        assert [i for i, t in enumerate(row) if t == BYTE_EOD] == [
            i for i, t in enumerate(original) if t == BYTE_EOD
        ]


def test_rearrangement_depends_on_the_seed_and_not_on_the_layout(
    corpus: Path,
) -> None:
    fim = {"rate": 0.5, **_IDS}
    with _loader(corpus, fim=fim, micro_batch_size=8) as loader:
        expected = _windows(loader, 4)
    ranks = [
        _loader(corpus, fim=fim, micro_batch_size=2, data_rank=r, data_size=2, num_workers=2)
        for r in range(2)
    ]
    assert [row for _ in range(8) for loader in ranks for row in _windows(loader, 1)] == expected
    for loader in ranks:
        loader.close()
    with _loader(corpus, fim=fim, micro_batch_size=8, seed=2) as other:
        assert _windows(other, 4) != expected


def test_epochs_are_rearranged_differently(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([51]), vocab_size=2004)
    with _loader(tmp_path / "c", fim={"rate": 1.0, **_IDS}) as loader:
        assert len({tuple(row) for row in _windows(loader, 3)}) > 6


def test_segments_and_masks_are_those_of_the_plain_samples(corpus: Path) -> None:
    fim, changes = {"rate": 1.0, **_IDS}, {"reset_at_documents": True}
    with _loader(corpus, fim=fim, **changes) as loader, _loader(corpus, **changes) as plain:
        batch, original = next(loader), next(plain)
    assert batch.segment_ids is not None
    assert original.segment_ids is not None
    assert torch.equal(batch.segment_ids, original.segment_ids)
    assert torch.equal(batch.labels == -100, original.labels == -100)


def test_held_out_documents_of_an_index_are_found(corpus: Path) -> None:
    stream = IndexedStream(IndexedDataset(corpus))
    ends = np.cumsum(_LENGTHS * 2)
    for place in range(stream.num_tokens):
        number = int(np.searchsorted(ends, place, side="right"))
        assert stream.document_at(place) == (ends[number] - (_LENGTHS * 2)[number], ends[number])


def _tokenizer(folder: Path, names: list[str]) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {"<unk>": 0, **{name: 10 + i for i, name in enumerate(names)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"], {}),
        (["<fim_prefix>", "<fim_middle>", "<fim_suffix>"], {}),
        (["[P]", "[M]", "[S]"], {"prefix": "[P]", "suffix": "[S]", "middle": "[M]"}),
    ],
)
def test_fim_tokens_are_found_in_the_tokenizer(
    tmp_path: Path, names: list[str], given: dict[str, str]
) -> None:
    spec = _tokenizer(tmp_path, names)
    write_corpus(tmp_path / "c", counting_documents([500], first=20), vocab_size=2004)
    (tmp_path / "c.json").unlink()
    with _loader(tmp_path / "c", fim={"rate": 1.0, **given}, tokenizer=spec) as loader:
        special = {token for row in _windows(loader, 3) for token in row if token < 20}
    assert special == {10, 11, 12}


@pytest.mark.parametrize(
    ("fim", "changes", "parts"),
    [
        (
            {"rate": 1.0},
            {},
            ("data.fim", "names", "tokenizer", ("data.tokenizer", "data.fim.prefix")),
        ),
        (
            {"rate": 1.0, **_IDS, "middle": 2004},
            {},
            ("data.fim.middle", 2004, "[0, 2004)", "model.vocab_size"),
        ),
        (
            {"rate": 1.0, **_IDS, "middle": _PRE},
            {},
            ("data.fim", [2001, 2002, 2001], "twice", "three"),
        ),
        (
            {"rate": 1.0, "prefix": 65, "suffix": 66, "middle": 67},
            {"kind": "bytes"},
            ("data.fim.prefix", 65, "[257, 2004)", "model.vocab_size"),
        ),
    ],
)
def test_unusable_fim_tokens_are_refused(
    corpus: Path, fim: dict[str, Any], changes: dict[str, Any], parts: tuple
) -> None:
    path = corpus.with_suffix(".bin") if changes else corpus
    with assert_refused(*parts, error=DataError):
        _loader(path, fim=fim, **changes)


def test_a_tokenizer_without_fim_tokens_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([500]), vocab_size=2004)
    (tmp_path / "c.json").unlink()
    spec = _tokenizer(tmp_path, ["a", "b"])
    with assert_refused(
        str(tmp_path),
        value="<|fim_prefix|>",
        constraint=("<|fim_suffix|>", "<fim_prefix>"),
        remedy="data.fim.prefix",
        error=DataError,
    ):
        _loader(tmp_path / "c", fim={"rate": 1.0}, tokenizer=spec)


@pytest.mark.parametrize(
    ("fim", "parts"),
    [
        ({"rate": 0.5, "prefix": 3}, ("data.fim", 3, "None", "three ids")),
        (
            {"rate": 0.5, "prefix": 3, "suffix": "a", "middle": 4},
            ("data.fim", 3, ("'a'", "4"), "three ids"),
        ),
    ],
)
def test_wrong_setting_is_refused(fim: dict[str, Any], parts: tuple) -> None:
    with assert_refused(*parts):
        DataConfig.model_validate({"train": "a", "sequence_length": 8, "fim": fim})


@pytest.mark.parametrize(
    ("fim", "message"),
    [
        ({}, "rate\n  Field required"),
        ({"rate": 0}, "greater than 0"),
        ({"rate": 1.1}, "less than or equal to 1"),
        ({"rate": 0.5, "level": "line"}, "'document' or 'window'"),
    ],
)
def test_value_of_the_wrong_type_or_range_is_refused(fim: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"train": "a", "sequence_length": 8, "fim": fim})
