from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel

from data_tools.errors import DataError
from data_tools.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

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
        assert [*map(list, tokenizer.encode_batch([_TEXT, "x"]))] == [ids, tokenizer.encode("x")]
        assert tokenizer.fingerprint == tokenizer_fingerprint(str(spec))
        assert tokenizer.eod_id == tokenizer.vocab_size - 1


def test_text_that_spells_a_special_token_becomes_it_only_where_it_is_parsed(
    tmp_path: Path,
) -> None:
    for path, end in (
        (_write_hugging_face(tmp_path / "tokenizer.json"), "<|endoftext|>"),
        (_write_sentencepiece(tmp_path / "t.model", remove_extra_whitespaces=False), "</s>"),
    ):
        text = f"before {end} after"
        plain = load_tokenizer(str(path))
        [ids] = map(list, plain.encode_batch([text]))
        assert plain.eod_id not in ids
        assert plain.decode(ids) == text
        for mode in ("parse", None):  # None: as in transformers
            parsed = load_tokenizer(str(path), special_tokens=mode)  # type: ignore[arg-type]
            [ids] = map(list, parsed.encode_batch([text]))
            assert ids.count(plain.eod_id) == 1
            assert parsed.decode(ids, skip_special_tokens=False) == text
            assert parsed.decode(ids) == "before  after"


@pytest.mark.parametrize("declared", ["<end>", {"content": "<end>", "lstrip": False}])
def test_end_token_is_the_one_that_the_directory_declares(tmp_path: Path, declared: object) -> None:
    _write_hugging_face(tmp_path / "tokenizer.json", eod="<end>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eod_id == tokenizer.vocab_size - 1


def test_end_token_that_no_file_names_must_be_given_where_one_is_needed(tmp_path: Path) -> None:
    path = _write_hugging_face(tmp_path / "tokenizer.json", eod="<end>")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.eod_id is None
    with _refused(
        "tokenizer.json",
        value="</s>",
        constraint="[EOS]",
        remedy=("--eod TOKEN", "--no-append-eod"),
    ):
        tokenizer.boundary_tokens.require_eod()
    for asked in ("<end>", tokenizer.vocab_size - 1):
        assert (
            load_tokenizer(str(path), eod=asked).boundary_tokens.require_eod()
            == tokenizer.vocab_size - 1
        )
    with _refused("tokenizer.json", value="<stop>", constraint="vocabulary", remedy="--eod TOKEN"):
        load_tokenizer(str(path), eod="<stop>")
    with _refused("tokenizer.json", value=900, constraint="below", remedy=("tokenizer", "token")):
        load_tokenizer(str(path), eod=900)


def test_two_usual_end_tokens_are_not_guessed_between(tmp_path: Path) -> None:
    path = _write_hugging_face(tmp_path / "tokenizer.json", eod="<|endoftext|>")
    backend = Tokenizer.from_file(str(path))
    # A piece of ordinary text, as <table> and </s> are in vocabularies that know HTML.
    backend.add_tokens([AddedToken("</s>", special=False)])
    backend.save(str(path))
    assert load_tokenizer(str(path)).boundary_tokens.require_eod() == backend.token_to_id(
        "<|endoftext|>"
    )
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    backend.save(str(path))
    with _refused(
        "tokenizer.json",
        value="<|endoftext|>",
        constraint="<eos>",
        remedy=("--eod TOKEN", "--no-append-eod"),
    ):
        load_tokenizer(str(path)).boundary_tokens.require_eod()


def test_sentencepiece_model_ends_documents_with_its_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(_write_sentencepiece(tmp_path / "t.model")))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (300, 2)
    ids = tokenizer.encode("some words \u4f60")
    assert tokenizer.decode(ids) == "some words \u4f60"
    assert [*map(list, tokenizer.encode_batch(["some words \u4f60"]))] == [ids]


def test_sentencepiece_model_without_eos_needs_a_named_piece(tmp_path: Path) -> None:
    path = _write_sentencepiece(
        tmp_path / "t.model", eos_id=-1, bos_id=-1, unk_id=0, control_symbols=["<done>"]
    )
    with _refused(
        "t.model", value="</s>", constraint="[EOS]", remedy=("--eod TOKEN", "--no-append-eod")
    ):
        load_tokenizer(str(path)).boundary_tokens.require_eod()
    assert load_tokenizer(str(path), eod="<done>").eod_id == 1


@pytest.mark.parametrize("kind", ["a post-processor", "bos_token", "nothing"])
def test_begin_token_is_written_where_transformers_writes_it_or_where_asked(
    tmp_path: Path, kind: str
) -> None:
    path = _write_hugging_face(tmp_path / "tokenizer.json")
    backend = Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<s>", "<lang>"])
    names = ["<lang>", "<s>"]
    ids = tuple(backend.token_to_id(name) for name in names)
    if kind == "a post-processor":
        backend.post_processor = processors.TemplateProcessing(
            single="<lang> <s> $A <|endoftext|>",
            special_tokens=[(t, backend.token_to_id(t)) for t in (*names, "<|endoftext|>")],
        )
    backend.save(str(path))
    if kind == "bos_token":
        # add_bos_token is for other files: a tokenizer.json says itself what is added.
        config = {"bos_token": "<s>", "add_bos_token": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = load_tokenizer(str(path)).boundary_tokens
    assert tokens.bos_ids(False) == ()
    assert tokens.bos_ids(None) == (ids if kind == "a post-processor" else ())
    if kind == "nothing":
        with _refused("--add-bos", value="token", constraint="begins", remedy="remove --add-bos"):
            tokens.bos_ids(True)
    else:
        assert tokens.bos_ids(True) == (ids if kind == "a post-processor" else ids[1:])


def test_end_token_that_only_the_post_processor_names_is_declared(tmp_path: Path) -> None:
    path = _write_hugging_face(tmp_path / "tokenizer.json", eod="[SEP]")
    backend = Tokenizer.from_file(str(path))
    end = backend.token_to_id("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", end)]
    )
    backend.save(str(path))
    assert load_tokenizer(str(path)).boundary_tokens.require_eod() == end


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("tokenizer.json", "{}", ("tokenizer.json", "tokenizer.json", "not a", "path")),
        ("tokenizer.json", "not json", ("tokenizer.json", "tokenizer.json", "not a", "path")),
        ("t.model", "not a model", ("t.model", "SentencePiece", "not", "path")),
        ("vocab.txt", "a", ("vocab.txt", ".txt", (".json", ".model"), "pass")),
    ],
)
def test_file_that_is_no_tokenizer_is_refused(
    tmp_path: Path, name: str, content: str, parts: tuple
) -> None:
    (tmp_path / name).write_text(content)
    with assert_refused(*parts, error=DataError):
        load_tokenizer(str(tmp_path / name))


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with _refused(
        str(tmp_path / "absent"),
        value="no such file",
        constraint="no",
        remedy=("`bytes`", "tokenizer.json"),
    ):
        load_tokenizer(str(tmp_path / "absent"))
    with _refused(
        str(tmp_path),
        value="tokenizer.json",
        constraint=("tokenizer.model", "vocab.json with merges.txt"),
        remedy="check",
    ):
        load_tokenizer(str(tmp_path))
    with _refused("--eod", value="</s>", constraint="`bytes`", remedy="remove"):
        load_tokenizer("bytes", eod="</s>")
    with _refused("--special-tokens", value="parse", constraint="`bytes`", remedy="remove"):
        load_tokenizer("bytes", special_tokens="parse")
