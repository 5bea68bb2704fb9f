"""Which ids mark prefix, suffix and middle: from the configuration or from the tokenizer."""

from __future__ import annotations

from data_tools.config import FimConfig
from data_tools.errors import DataError
from data_tools.sampling.fim import Sentinels
from data_tools.tokenization.tokenizers import token_finder

# Prefix, suffix and middle of Qwen2.5 and CodeGemma, StarCoder, Code Llama.
_KNOWN_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)


def find_sentinels(
    config: FimConfig, *, tokenizer: str | None, first_id: int, vocab_size: int
) -> Sentinels:
    """The ids of `data.fim`; what it names, or without names what is usual, is looked up.

    Raises:
        DataError: there is no such token, or the three ids are not different ones of
            [first_id, vocab_size).
    """
    given = (config.prefix, config.suffix, config.middle)
    ids = [each for each in given if isinstance(each, int)]
    if len(ids) < len(given):
        ids = _look_up([each for each in given if isinstance(each, str)], tokenizer)
    for name, token in zip(Sentinels._fields, ids, strict=True):
        if not first_id <= token < vocab_size:
            raise DataError(
                f"data.fim.{name} is id {token}, which is not in [{first_id}, {vocab_size}), the "
                "ids of special tokens that the model has; correct it or raise model.vocab_size"
            )
    if len(set(ids)) < len(ids):
        raise DataError(f"data.fim has the same id twice in {ids}; give three different ones")
    return Sentinels(*ids)


def _look_up(names: list[str], tokenizer: str | None) -> list[int]:
    if tokenizer is None or tokenizer == "bytes":
        raise DataError(
            "data.fim names its tokens, but there is no tokenizer to look them up in; set "
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
        f"{tokenizer}: its vocabulary does not have all of {tried}; give the tokens' names or ids "
        "as data.fim.prefix, suffix and middle"
    )
