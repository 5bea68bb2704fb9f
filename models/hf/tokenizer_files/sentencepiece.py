"""A byte-pair SentencePiece model as a tokenizer.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from models.hf.tokenizer_files.check import Training, sample_of

_USER_DEFINED = 4  # the type of a piece
_SPACE = "\u2581"


class _Source(NamedTuple):
    """Parts of a tokenizer. `symbols`: the user-defined pieces, which are never merged."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    special: list[Any]
    added: list[Any]
    symbols: list[str]
    unknown: str
    byte_fallback: bool
    prefix: bool


def write_sentencepiece(source: Path, target: Path, training: Training) -> list[str]:
    """Write the form that encodes like the model, or else the usual one; returns the user-defined
    symbols.

    Raises:
        ValueError: the model is of a kind that has no such form.
    """
    parts = _read(source)
    usual, *others = _forms(parts)
    alike = (form for form in (usual, *others) if _encodes_alike(form, parts.symbols, training))
    next(alike, usual).save(str(target))
    return parts.symbols


def _read(path: Path) -> _Source:
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    extractor = SentencePieceExtractor(str(path))
    trainer, rules = extractor.proto.trainer_spec, extractor.proto.normalizer_spec
    if trainer.model_type != trainer.BPE or rules.precompiled_charsmap:
        raise ValueError(
            f"{path}: only byte-pair SentencePiece models without normalization can be exported; "
            "pass --no-tokenizer to export the model without it"
        )
    parts = extractor.extract(BPE)
    added = parts["additional_special_tokens"]
    return _Source(
        parts["vocab"],
        parts["merges"],
        special=[token for token in added if token.special],
        added=[token for token in added if not token.special],
        symbols=[piece.piece for piece in extractor.proto.pieces if piece.type == _USER_DEFINED],
        unknown=trainer.unk_piece,
        byte_fallback=trainer.byte_fallback,
        prefix=rules.add_dummy_prefix,
    )


def _forms(source: _Source) -> list[Any]:
    """Tokenizers that may be equal to the model, the usual one first.

    SentencePiece puts its dummy prefix before the whole text and then looks for user-defined
    symbols. Added tokens are looked for first, so that what follows each of them gets a prefix, and
    `<s>` is found before a symbol `<s`. The second form splits the text at symbols instead, each of
    which is then found in the vocabulary as a whole.
    """
    tokenizer = _tokenizer(source, ignore_merges=False)
    tokenizer.add_tokens(source.added)
    forms = [tokenizer]
    if source.symbols:
        forms.append(_split_at_symbols(source))
    return [form for form in forms if form is not None]


def _split_at_symbols(source: _Source) -> Any:
    """The form that splits text at symbols. None if a word that merges cannot form (`</s>`, a byte)
    would then be matched as a whole as well."""
    from tokenizers import Regex, pre_tokenizers

    by_merges = _tokenizer(source, ignore_merges=False).model

    def pieces(text: str) -> list[str]:
        return [token.value for token in by_merges.tokenize(text)]

    words = [w for w in source.vocab if w not in source.symbols and pieces(w) != [w]]
    parts = {word: _unmerged_split(word, pieces) for word in words}
    if any(not set(part) or set(part) & set(words) for part in parts.values()):
        return None
    # A symbol that holds a space is never found: by then every space is another character.
    longest_first = sorted(source.symbols, key=len, reverse=True)
    steps = ["|".join(map(re.escape, longest_first))]
    if parts:
        whole = (f"{re.escape(a)}(?={re.escape(b)}\\z)" for a, b in parts.values())
        steps.append(rf"\A(?:{'|'.join(whole)})")
    tokenizer = _tokenizer(source, ignore_merges=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(step), behavior="isolated") for step in steps]
    )
    return tokenizer


def _unmerged_split(word: str, pieces: Any) -> tuple[str, ...]:
    """Two parts of a word that no merge joins; empty if there are none."""
    for i in range(1, len(word)):
        if pieces(word[:i]) + pieces(word[i:]) == pieces(word):
            return word[:i], word[i:]
    return ()


def _tokenizer(source: _Source, *, ignore_merges: bool) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(
        BPE(
            vocab=source.vocab,
            merges=source.merges,
            unk_token=source.unknown,
            fuse_unk=True,
            byte_fallback=source.byte_fallback,
            ignore_merges=ignore_merges,
        )
    )
    steps = [normalizers.Prepend(_SPACE)] if source.prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if source.prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(source.special)
    return tokenizer


def _encodes_alike(tokenizer: Any, symbols: list[str], training: Training) -> bool:
    tokenizer.encode_special_tokens = True
    texts = sample_of(tokenizer, symbols).texts
    rows = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokenizer.encode_special_tokens = False
    return all(r.ids == training.encode(x) for r, x in zip(rows, texts, strict=True))
