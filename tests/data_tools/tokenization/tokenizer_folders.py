"""Small tokenizers in folders, as their owners publish them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "river stone carries the cold water over a bridge, caf\u00e9 \u4f60\u597d 12\t\n"


def byte_level(
    folder: Path, special: Sequence[str | AddedToken] = (), *, begin: str | None = None
) -> Path:
    """A folder with a byte-level tokenizer.json; `begin`: what its post-processor puts first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    for token in special:
        is_text = isinstance(token, str)
        tokenizer.add_tokens([AddedToken(token, special=True) if is_text else token])
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece_model(folder: Path, **changes: Any) -> Path:
    """A folder with a tokenizer.model: ids 0 to 2 are <unk>, <s> and </s>."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 300,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "minloglevel": 2,
        **changes,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 10), model_writer=model, model_type="bpe", **settings
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def declare(folder: Path, **files: dict[str, Any]) -> Path:
    """Write NAME.json of each keyword beside a tokenizer."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def entry(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """A token as tokenizer_config.json spells it."""
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special, **plain, **flags}
