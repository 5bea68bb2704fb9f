from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.origin import origin_of
from data_tools.errors import DataError
from data_tools.preprocess import main as preprocess
from data_tools.split import main, split, split_bounds, split_in_order
from data_tools.verify import verify
from tests.data_tools.corpora import (
    counting_documents,
    megatron_datasets,
    write_corpus,
    write_megatron_corpus,
)
from tests.data_tools.tokenization.tokenizer_folders import byte_level, declare
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_TEXTS = [f"document number {i % 300}, caf\u00e9" for i in range(900)]  # each of them three times


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in _TEXTS)
    (tmp_path / "in.jsonl").write_text(lines)
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "all")]
    preprocess([*arguments, "--tokenizer", "bytes", "--license", "CC0", "--workers", "1"])
    return str(tmp_path / "all")


def _split(corpus: str, name: str = "", **options: object) -> list[list[str]]:
    """Texts of the two halves."""
    outputs = [f"{corpus}_{half}{name}" for half in ("train", "validation")]
    split(corpus, *outputs, **{"share": 0.1, **options})  # type: ignore[arg-type]
    halves = [IndexedDataset(output) for output in outputs]
    return [
        [bytes(half.document(i)[:-1].tolist()).decode() for i in range(half.num_documents)]
        for half in halves
    ]


def test_equal_documents_never_cross_and_none_is_lost(corpus: str) -> None:
    train, validation = _split(corpus)
    assert sorted(train + validation) == sorted(_TEXTS)
    assert not set(train) & set(validation)
    assert 0.05 < len(validation) / len(_TEXTS) < 0.15
    assert validation == [text for text in _TEXTS if text in set(validation)]  # in order


def test_splits_are_complete_corpora_with_their_bytes(
    corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [f"{corpus}_{half}" for half in ("train", "validation")]
    main([corpus, "--train", outputs[0], "--validation", outputs[1], "--share", "0.2"])
    assert f"{outputs[1]}.bin/.idx: " in capsys.readouterr().out
    for output in outputs:
        verify(output)
        dataset = IndexedDataset(output)
        assert dataset.info is not None
        assert dataset.info.licence == "CC0"
        # Bytes as tokens: the text is what is not an end of document.
        assert dataset.info.num_bytes == dataset.num_tokens - dataset.num_documents


def test_split_depends_only_on_the_seed_and_the_document(corpus: str, tmp_path: Path) -> None:
    first, again, other = (
        _split(corpus, name, seed=seed) for name, seed in (("1", 0), ("2", 0), ("3", 1))
    )
    assert first == again != other
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": first[1][0]}) + '\n{"text": "x"}\n' * 9)
    arguments = ["--input", str(tmp_path / "few.jsonl"), "--output", str(tmp_path / "few")]
    preprocess([*arguments, "--tokenizer", "bytes"])
    assert first[1][0] in _split(str(tmp_path / "few"))[1]


@pytest.fixture
def megatron_corpus(tmp_path: Path) -> tuple[str, list[list[int]]]:
    """50 documents that Megatron wrote, each of bytes and an end token."""
    generator = np.random.default_rng(0)
    documents = [np.append(generator.integers(0, 256, size=40), 256) for _ in range(50)]
    prefix = write_megatron_corpus(tmp_path / "m", documents, dtype="uint16")
    return str(prefix), [document.tolist() for document in documents]


def _ids(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


@pytest.mark.parametrize("ratios", ["969,30,1", "900,50,50", "98,2,0", "1", "0,7,3", ".5,.25,.25"])
@pytest.mark.parametrize("num_documents", [1, 10, 50, 12_345])
def test_ratios_cut_where_megatron_cuts(ratios: str, num_documents: int) -> None:
    module = megatron_datasets("blended_megatron_dataset_config")
    shares = module.parse_and_normalize_split(ratios)
    matrix = module.convert_split_vector_to_split_matrix(shares)
    theirs = [
        None if part is None else tuple(round(x * float(num_documents)) for x in part)
        for part in matrix
    ]
    for ours, expected in zip(split_bounds(ratios, num_documents), theirs, strict=True):
        assert ours == expected if expected is not None else ours[0] == ours[1]


@pytest.mark.parametrize("tokenizer", [None, "bytes"])
def test_splits_of_a_megatron_corpus_are_in_order_and_complete(
    megatron_corpus: tuple[str, list[list[int]]],
    tokenizer: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix, documents = megatron_corpus
    options = [] if tokenizer is None else ["--tokenizer", tokenizer]
    outputs = [f"{prefix}_{part}" for part in ("train", "validation", "test")]
    named = dict(zip(("--train", "--validation", "--test"), outputs, strict=True))
    arguments = [each for pair in named.items() for each in pair]
    main([prefix, "--split", "900,60,40", *arguments, *options])
    assert [_ids(each) for each in outputs] == [documents[:45], documents[45:48], documents[48:]]
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].startswith(f"{outputs[2]}.bin/.idx: 2 documents, 82 tokens")
    for output, count in zip(outputs, (45, 3, 2), strict=True):
        info = IndexedDataset(output).info
        if tokenizer is None:
            assert info is None
        else:
            assert info is not None
            assert (info.num_bytes, info.eod_id, info.tokenizer) == (count * 40, 256, "bytes")
            verify(output)


def test_share_of_a_corpus_of_megatron_is_held_out_by_hash(
    megatron_corpus: tuple[str, list[list[int]]],
) -> None:
    prefix, documents = megatron_corpus
    train, validation = f"{prefix}_train", f"{prefix}_validation"
    assert split(prefix, train, validation, share=0.2) == [None, None]
    assert sorted(_ids(train) + _ids(validation)) == sorted(documents)
    infos = split(prefix, train, validation, share=0.2, tokenizer="bytes", overwrite=True)
    assert [info and info.num_bytes for info in infos] == [
        40 * len(_ids(train)),
        40 * len(_ids(validation)),
    ]


def test_parsed_tokens_count_as_the_text_that_spells_them(tmp_path: Path) -> None:
    byte_level(tmp_path / "t", ["<|begin|>", "<|end|>", "<|im_end|>"], begin="<|begin|>")
    declare(tmp_path / "t", tokenizer_config={"eos_token": "<|end|>"})
    texts = [f"river {i}<|im_end|> caf\u00e9" for i in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(lines)
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "all")]
    preprocess([*arguments, "--tokenizer", str(tmp_path / "t"), "--workers", "1"])
    whole = IndexedDataset(tmp_path / "all").info
    infos = split_in_order(
        str(tmp_path / "all"),
        {"--train": str(tmp_path / "a"), "--validation": str(tmp_path / "b")},
        ratios="1,1",
    )
    assert whole is not None
    for info, part in zip(infos, (texts[:30], texts[30:]), strict=True):
        assert info is not None
        assert info.num_bytes == sum(len(text.encode()) for text in part)
        assert info.text_rules == whole.text_rules == (301, (300,), "parse")
    assert infos[0] is not None
    # The tokenizer finds the marks of a corpus that says nothing of them.
    (tmp_path / "all.json").unlink()
    with _refused("document", value=0, constraint=("302", "--eod"), remedy="--eod"):
        origin_of(IndexedDataset(tmp_path / "all"), tokenizer=str(tmp_path / "t"), eod="<|im_end|>")
    origin = origin_of(IndexedDataset(tmp_path / "all"), tokenizer=str(tmp_path / "t"))
    assert origin is not None
    assert origin.text == (301, (300,), "parse")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ["--split", "9,1", "--train", "a"],
            ("--validation", 5, "--split 9,1", ("--validation", "ratios")),
        ),
        (
            ["--split", "9,1,0", "--train", "a", "--validation", "b", "--test", "c"],
            ("--test", "c", ("--split 9,1,0", "0 of 50"), ("remove", "ratios")),
        ),
        (["--split", "9,x", "--train", "a"], ("--split", "9,x", "three numbers", "969,30,1")),
        (["--split", "0,0", "--train", "a"], ("--split", "0,0", "three numbers", "969,30,1")),
        (
            ["--split", "1,1,1,1", "--train", "a"],
            ("--split", "1,1,1,1", "three numbers", "969,30,1"),
        ),
        (
            ["--split", "9,1", "--train", "a", "--validation", "b", "--seed", "1"],
            ("--seed", 1, "--split", "remove"),
        ),
        (
            ["--share", "0.1", "--train", "a"],
            ("--share", "--train", ("--validation", "--test"), "pass"),
        ),
        (
            ["--share", "0.1", "--train", "a", "--validation", "b", "--eod", "x"],
            ("--eod", "x", "tokenizer", "--tokenizer"),
        ),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(
    megatron_corpus: tuple[str, list[list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    parts: tuple,
) -> None:
    monkeypatch.chdir(tmp_path)
    with assert_refused(*parts, error=DataError):
        main([megatron_corpus[0], *options])
    assert not list(tmp_path.glob("[abc].*"))


def test_failed_split_leaves_nothing(corpus: str, tmp_path: Path) -> None:
    with _refused("--share", value=1.5, constraint="0 and 1", remedy="pass"):
        _split(corpus, share=1.5)
    with _refused("all_validation", value=900, constraint="none", remedy=("--share", "--seed")):
        _split(corpus, share=1e-9)
    with _refused(
        "--validation", value=f"{corpus}_validation", constraint="different", remedy="other"
    ):
        split(corpus, corpus, f"{corpus}_validation", share=0.1, overwrite=True)
    write_corpus(tmp_path / "c", counting_documents([3, 4]))
    with _refused(
        str(tmp_path / "c"), value="tokenizer.model", constraint="missing", remedy="--tokenizer"
    ):
        _split(str(tmp_path / "c"))
    assert not list(tmp_path.glob("*_train*"))
