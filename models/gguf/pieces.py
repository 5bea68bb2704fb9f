"""SentencePiece models as llama.cpp's `llama` vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.gguf.vocabulary import (
    INSTEAD,
    Token,
    TokenType,
    Vocabulary,
    check_user_defined,
    filled,
    spelt_remark,
)

_SPACE = "\u2581"
# Never merged with what is around them.
_APART = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
_NEVER_IN_TEXT = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)


class Declared(NamedTuple):
    """A token that a file beside a model names: its id, and whether plain text never becomes it."""

    number: int
    special: bool


def piece_vocabulary(
    path: Path, size: int, *, declared: Mapping[str, Declared] | None = None
) -> Vocabulary:
    """The vocabulary of a SentencePiece model for a model of `size` ids; `declared`: the tokens of
    the files beside it.

    Raises:
        ValueError: llama.cpp has no equal tokenizer.
    """
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    proto = SentencePieceExtractor(str(path)).proto
    _check_kind(path, proto)
    known = {
        number: Token(piece.piece, TokenType(piece.type), piece.score)
        for number, piece in enumerate(proto.pieces)
    }
    for text, token in (declared or {}).items():
        _add(known, text, token, path=path)
    source, prefix = str(path), proto.normalizer_spec.add_dummy_prefix
    user_defined = [t.text for t in known.values() if t.type == TokenType.USER_DEFINED]
    remarks = check_user_defined(user_defined, source=source)
    for text in user_defined:
        if prefix or _SPACE in text or " " in text:
            raise ValueError(
                f"{source}: user_defined_symbols has {text!r} with add_dummy_prefix={prefix}, and "
                "llama.cpp puts a space behind each with a prefix, and finds spaces in them "
                f"otherwise; train without one of them, or {INSTEAD}"
            )
    tokens = filled(known, size, source=source)
    if prefix:
        remarks.append(
            "where llama.cpp parses special tokens in a text, it puts the space of "
            "add_dummy_prefix behind each, too: training put it in front of a text alone"
        )
    return Vocabulary(
        "llama",
        tokens,
        prefix=prefix,
        unknown=proto.trainer_spec.unk_id,
        remarks=(*remarks, *spelt_remark(_merged_to_special(tokens))),
    )


def _add(known: dict[int, Token], text: str, token: Declared, *, path: Path) -> None:
    """Add a token that a file beside the model names, if the model does not have it."""
    own = known.get(token.number)
    if token.special or (own is not None and own.type in _APART):
        known.setdefault(token.number, Token(text, TokenType.CONTROL))
        return
    raise ValueError(
        f"{path}: a file beside it adds {text!r}, which is then found in plain text as a whole, "
        f"and llama.cpp has no equal token; {INSTEAD}"
    )


def _check_kind(path: Path, proto: Any) -> None:
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or rules.precompiled_charsmap:
        kind = trainer.ModelType.Name(trainer.model_type).lower()
        raise ValueError(
            f"{path}: model_type={kind} with normalization {rules.name or 'identity'}, llama.cpp "
            f"has byte-pair models without normalization; {INSTEAD}"
        )
    given = {
        "remove_extra_whitespaces": (rules.remove_extra_whitespaces, False),
        "escape_whitespaces": (rules.escape_whitespaces, True),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "byte_fallback": (trainer.byte_fallback, True),
    }
    for name, (value, allowed) in given.items():
        if value != allowed:
            raise ValueError(
                f"{path}: {name}={value}, llama.cpp only has {allowed}; train the tokenizer so, or "
                f"{INSTEAD}"
            )
    for piece in proto.pieces:
        if piece.type == TokenType.UNUSED:
            raise ValueError(
                f"{path}: the piece {piece.piece!r} is unused, and llama.cpp would use it; "
                f"{INSTEAD}"
            )


def _merged_to_special(tokens: list[Token]) -> list[str]:
    """Tokens that are never made of plain text, except by llama.cpp: it also merges to a special
    token where two pieces make up its text."""
    texts = {token.text for token in tokens}
    found = []
    for token in tokens:
        cuts = range(1, len(token.text)) if token.type in _NEVER_IN_TEXT else ()
        parts = ((token.text[:cut], token.text[cut:]) for cut in cuts)
        if any(all(len(part) == 1 or part in texts for part in pair) for pair in parts):
            found.append(token.text)
    return found
