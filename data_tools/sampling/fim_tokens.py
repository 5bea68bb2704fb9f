"""Lookup of the fill-in-the-middle sentinel tokens in the configuration or the tokenizer."""

from __future__ import annotations

from data_tools.config import FimConfig
from data_tools.errors import DataError
from data_tools.sampling.fim import FimTokens
from data_tools.tokenization.tokenizers import token_finder

# Prefix, suffix and middle tokens of Qwen2.5 and CodeGemma, StarCoder, Code Llama.
_KNOWN_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)


def find_fim_tokens(
    config: FimConfig, *, tokenizer: str | None, first_id: int, vocab_size: int
) -> FimTokens:
    """Return the ids of the sentinels of `data.fim`.

    Token names, or the well-known names if none are given, are looked up in the tokenizer.

    Raises:
        DataError: a token does not exist, or the ids are not three different ones in
            [first_id, vocab_size).
    """
    given = (config.prefix, config.suffix, config.middle)
    ids = [each for each in given if isinstance(each, int)]
    if len(ids) < len(given):
        ids = _look_up([each for each in given if isinstance(each, str)], tokenizer)
    for name, token in zip(FimTokens._fields, ids, strict=True):
        if not first_id <= token < vocab_size:
            raise DataError(
                f"data.fim.{name} is id {token}, which is not in [{first_id}, {vocab_size}), the "
                "special token ids of the model; correct it or raise model.vocab_size"
            )
    if len(set(ids)) < len(ids):
        raise DataError(f"data.fim has the same id twice in {ids}; give three different ids")
    return FimTokens(*ids)


def _look_up(names: list[str], tokenizer: str | None) -> list[int]:
    if tokenizer is None or tokenizer == "bytes":
        raise DataError(
            "data.fim gives token names, but there is no tokenizer to look them up in; set "
            "data.tokenizer, or give ids as data.fim.prefix, suffix and middle"
        )
    find = token_finder(tokenizer)
    candidates = (tuple(names),) if names else _KNOWN_NAMES
    for candidate in candidates:
        ids = [find(name) for name in candidate]
        found = [token for token in ids if token is not None]
        if len(found) == len(candidate):
            return found
    tried = " or ".join(", ".join(candidate) for candidate in candidates)
    raise DataError(
        f"{tokenizer}: its vocabulary does not have all of {tried}; set data.fim.prefix, suffix "
        "and middle to token names or ids"
    )
