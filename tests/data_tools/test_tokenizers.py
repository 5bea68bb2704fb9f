from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from data_tools.errors import DataError
from data_tools.tokenizers import load_tokenizer, tokenizer_fingerprint

_TEXT = "def f(x):\n    return x + 1  # caf\u00e9 \u4f60\u597d\t\U0001f600\r\n\n"


def _write_hugging_face(path: Path, *, eod: str | None = "<|endoftext|>") -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT] * 10, trainer)
    if eod is not None:
        tokenizer.add_special_tokens([AddedToken(eod, special=True)])
    tokenizer.enable_truncation(4)  # some published files have it on: text would be lost
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(path))
    return path


def _write_sentencepiece(path: Path, **changes: object) -> Path:
    model = io.BytesIO()
    settings = {"vocab_size": 300, "byte_fallback": True, "minloglevel": 2, **changes}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from, and some more"] * 10),
        model_writer=model,
        model_type="bpe",
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


def test_bytes_are_their_own_ids_and_256_ends_a_document() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("a\u00e9") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([*tokenizer.encode(_TEXT), 256]) == _TEXT
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)


def test_hugging_face_file_gives_back_the_text_whole(tmp_path: Path) -> None:
    path = _write_hugging_face(tmp_path / "tokenizer.json")
    for spec in (path, tmp_path):
        tokenizer = load_tokenizer(str(spec))
        ids = tokenizer.encode(_TEXT)
        assert tokenizer.decode(ids) == _TEXT
        assert tokenizer.encode_batch([_TEXT, "x"]) == [ids, tokenizer.encode("x")]
        assert tokenizer.fingerprint == tokenizer_fingerprint(str(spec))
        assert tokenizer.eod_id == tokenizer.vocab_size - 1


def test_text_that_spells_a_special_token_does_not_become_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(_write_hugging_face(tmp_path / "tokenizer.json")))
    text = "before <|endoftext|> after"
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == text
    tokenizer = load_tokenizer(str(_write_sentencepiece(tmp_path / "t.model")))
    assert tokenizer.eod_id not in tokenizer.encode("before </s> after")


@pytest.mark.parametrize("declared", ["<end>", {"content": "<end>", "lstrip": False}])
def test_end_token_is_the_one_that_the_directory_declares(tmp_path: Path, declared: object) -> None:
    _write_hugging_face(tmp_path / "tokenizer.json", eod="<end>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eod_id == tokenizer.vocab_size - 1


def test_end_token_that_no_file_names_must_be_given(tmp_path: Path) -> None:
    path = _write_hugging_face(tmp_path / "tokenizer.json", eod="<end>")
    with pytest.raises(DataError, match="no token ends a document; name one with --eod TOKEN"):
        load_tokenizer(str(path))
    tokenizer = load_tokenizer(str(path), eod="<end>")
    assert tokenizer.eod_id == tokenizer.vocab_size - 1
    with pytest.raises(DataError, match="none of <stop> is in its vocabulary"):
        load_tokenizer(str(path), eod="<stop>")


def test_sentencepiece_model_ends_documents_with_its_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(_write_sentencepiece(tmp_path / "t.model")))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (300, 2)
    ids = tokenizer.encode("some words \u4f60")
    assert tokenizer.decode(ids) == "some words \u4f60"
    assert tokenizer.encode_batch(["some words \u4f60"]) == [ids]


def test_sentencepiece_model_without_eos_needs_a_named_piece(tmp_path: Path) -> None:
    path = _write_sentencepiece(
        tmp_path / "t.model", eos_id=-1, bos_id=-1, unk_id=0, control_symbols=["<done>"]
    )
    with pytest.raises(DataError, match="name one with --eod TOKEN"):
        load_tokenizer(str(path))
    assert load_tokenizer(str(path), eod="<done>").eod_id == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("tokenizer.json", "not json", "not a tokenizer.json"),
        ("t.model", "not a model", "not a SentencePiece model"),
        ("vocab.txt", "a", "suffix .txt found, .json .Hugging Face. or .model"),
    ],
)
def test_file_that_is_no_tokenizer_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path / name))


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such file; give `bytes`, a tokenizer.json"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"no tokenizer.json or tokenizer.model in it"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="--eod </s> has no effect with the tokenizer `bytes`"):
        load_tokenizer("bytes", eod="</s>")
