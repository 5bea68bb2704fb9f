"""The tokenizers of the files, as llama.cpp reads text with them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_tools.tokenization.tokenizers import Tokenizer as TrainingTokenizer
from data_tools.tokenization.tokenizers import load_tokenizer
from models.gguf.export import to_gguf
from parallel.checkpoint.manifest import TextRecord
from tests.models.checkpoints import config, write_checkpoint
from tests.models.gguf.llama_cpp_runs import opened, tokenized
from tests.models.gguf.tokenizer_kinds import KINDS, VOCAB_SIZE
from tests.models.hf.tokenizer_files import TEXT, sentencepiece_file

pytestmark = pytest.mark.ecosystem
LINES = (
    TEXT,
    "The quick brown fox jumps over 12345 lazy dogs, don't they? I'LL SAY they'Ve.",
    " leading and trailing ",
    "def f(x):\n\n    return  x\t# tab\r\n\n\n  y",
    "h\u00e9llo \u65e5\u672c \U0001f600 \u2581 \u00a0\u3000 x\u00b2 \u0663\u0664",
    "a</s> <s> <|endoftext|> <|chat|> <unk> <0x0A>",
    "word " * 200,
)
SEPARATORS = (
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "'",
    "'s",
    "1",
    "1234",
    "_",
    "<",
    "\u00e9",
)


def _texts() -> Iterator[str]:
    yield from LINES
    yield from (chr(i) for i in range(1, 256))
    numbers = random.Random(5)
    fragments = [*SEPARATORS, *TEXT.split(), *LINES[4].split(), "some", "Words", "\u65e5"]
    for _ in range(1000):
        yield "".join(numbers.choice(fragments) for _ in range(numbers.randint(2, 12)))


def _exported(tmp_path: Path, spec: str, **text: Any) -> Path:
    write_checkpoint(
        tmp_path / "step_1",
        config(num_layers=1, vocab_size=VOCAB_SIZE),
        tokenizer=spec,
        text=TextRecord(**text),
    )
    to_gguf(tmp_path / "step_1", tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


def _compare(model: Any, tokenizer: TrainingTokenizer) -> None:
    # The pieces of a text show the space that the tokenizer put in front of it.
    prefix = " " if model.metadata.get("tokenizer.ggml.add_space_prefix") == "true" else ""
    for text in _texts():
        expected = tokenizer.encode(text)
        assert tokenized(model, text) == expected, repr(text)
        back = model.detokenize(expected).decode("utf-8", errors="replace")
        assert back.removeprefix(prefix) == tokenizer.decode(expected), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_and_writes_text_as_the_training_tokenizer(kind, tmp_path):
    path = KINDS[kind].write(tmp_path)
    end = "</s>" if path.suffix == ".model" else "<|endoftext|>"
    tokenizer = load_tokenizer(str(path), eod=end)
    file = _exported(tmp_path, str(path), eod_id=tokenizer.eod_id)
    with opened(file, vocabulary_only=True) as model:
        assert model.metadata.get("tokenizer.ggml.pre") == KINDS[kind].pre
        _compare(model, tokenizer)
        assert model.token_eos() == tokenizer.eod_id
        special = model.tokenize(end.encode(), add_bos=True, special=True)
        assert special == [tokenizer.eod_id]


def test_llama_cpp_reads_and_writes_bytes(tmp_path):
    file = _exported(tmp_path, "bytes")
    with opened(file, vocabulary_only=True) as model:
        _compare(model, load_tokenizer("bytes"))
        assert model.token_eos() == 256


def test_a_text_begins_as_the_documents_of_training(tmp_path):
    path = KINDS["prefix model"].write(tmp_path)
    file = _exported(tmp_path, str(path), eod_id=2, bos_ids=(1,))
    with opened(file, vocabulary_only=True) as model:
        ids = load_tokenizer(str(path)).encode("some words")
        assert model.tokenize(b"some words", add_bos=True) == [1, *ids]
        # As the remark of such a file says.
        parsed = model.tokenize(b"</s>some words", add_bos=False, special=True)
        assert parsed == [2, *ids]
        parsing = load_tokenizer(str(path), special_tokens="parse")
        assert parsing.encode("</s>some words") != parsed


def test_a_remark_says_where_llama_cpp_reads_text_otherwise(tmp_path):
    """Text that is not in NFC, that spells a special token, or one that is known by name."""
    path = KINDS["qwen2 json"].write(tmp_path)
    tokenizer = load_tokenizer(str(path), eod="<|endoftext|>")
    file = _exported(tmp_path, str(path), eod_id=tokenizer.eod_id)
    with opened(file, vocabulary_only=True) as model:
        assert tokenized(model, "e\u0301") != tokenizer.encode("e\u0301")
        assert tokenized(model, "\u00e9") == tokenizer.encode("e\u0301")
        # A contraction, where case is folded; llama.cpp takes letters in lower case.
        assert tokenized(model, "'\u017fs") != tokenizer.encode("'\u017fs")
    path = sentencepiece_file(tmp_path / "t.model", eos_piece="!?")
    write_checkpoint(
        tmp_path / "s", config(num_layers=1, vocab_size=VOCAB_SIZE), tokenizer=str(path)
    )
    remarks = to_gguf(tmp_path / "s", tmp_path / "n.gguf")
    assert any("!?" in remark for remark in remarks)
    with opened(tmp_path / "n.gguf", vocabulary_only=True) as model:
        assert 2 in tokenized(model, "a!?")
        assert 2 not in load_tokenizer(str(path)).encode("a!?")


def test_a_special_token_that_is_a_word_is_remarked_on(tmp_path):
    path = KINDS["llama3 json"].write(tmp_path)
    added = Tokenizer.from_file(str(path))
    added.add_special_tokens(["stop"])
    added.add_tokens(["<|fim_prefix|>"])
    added.save(str(path))
    tokenizer = load_tokenizer(str(path), eod="<|endoftext|>")
    write_checkpoint(
        tmp_path / "s", config(num_layers=1, vocab_size=VOCAB_SIZE), tokenizer=str(path)
    )
    remarks = "\n".join(to_gguf(tmp_path / "s", tmp_path / "m.gguf", eod="<|endoftext|>"))
    with opened(tmp_path / "m.gguf", vocabulary_only=True) as model:
        for text in ("stop", "<|fim_prefix|>"):
            assert text in remarks
            assert tokenized(model, text) != tokenizer.encode(text)
