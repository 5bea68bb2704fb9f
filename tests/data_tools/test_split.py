from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.indexed import IndexedDataset
from data_tools.preprocess import main as preprocess
from data_tools.split import main, split
from data_tools.verify import verify
from tests.data_tools.corpora import counting_documents, write_corpus

_TEXTS = [f"document number {i % 300}, caf\u00e9" for i in range(900)]  # each of them three times


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in _TEXTS)
    (tmp_path / "in.jsonl").write_text(lines)
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "all")]
    preprocess([*arguments, "--tokenizer", "bytes", "--licence", "CC0", "--workers", "1"])
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


def test_halves_are_whole_corpora_with_their_bytes(
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


def test_choice_depends_on_the_seed_and_the_document_alone(corpus: str, tmp_path: Path) -> None:
    first, again, other = (
        _split(corpus, name, seed=seed) for name, seed in (("1", 0), ("2", 0), ("3", 1))
    )
    assert first == again != other
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": first[1][0]}) + '\n{"text": "x"}\n' * 9)
    arguments = ["--input", str(tmp_path / "few.jsonl"), "--output", str(tmp_path / "few")]
    preprocess([*arguments, "--tokenizer", "bytes"])
    assert first[1][0] in _split(str(tmp_path / "few"))[1]


def test_split_that_cannot_be_made_leaves_nothing(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--share 1.5 must be between 0 and 1"):
        _split(corpus, share=1.5)
    with pytest.raises(DataError, match=r"all_validation: no document fell to it of 900"):
        _split(corpus, share=1e-9)
    with pytest.raises(DataError, match="must be three different corpora"):
        split(corpus, corpus, f"{corpus}_validation", share=0.1, overwrite=True)
    write_corpus(tmp_path / "c", counting_documents([3, 4]))
    with pytest.raises(DataError, match=r"its tokenizer tokenizer.model is not there or has chang"):
        _split(str(tmp_path / "c"))
    assert not list(tmp_path.glob("*_train*"))
