"""Small tokenizers of the kinds that models come with."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

TEXT = "Some words to learn from,\n\tand some more: 1234 \u00e9\n"
# Settings of SentencePiece with which python -m data_tools.train_tokenizer trains.
TRAINED_HERE = {
    "add_dummy_prefix": False,
    "user_defined_symbols": ["\n"],
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "bos_id": -1,
    "eos_id": 1,
}


def sentencepiece_file(path: Path, **changes: object) -> Path:
    """A byte-pair SentencePiece model with its defaults, but for normalization."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 290,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=model, **(settings | changes)
    )
    path.write_bytes(model.getvalue())
    return path


def hugging_face_file(
    path: Path, *, special: Sequence[str] = ("<|endoftext|>",), split: str | None = None
) -> Path:
    """A byte-level tokenizer.json; `split`: the regular expression of words, after NFC."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return path
