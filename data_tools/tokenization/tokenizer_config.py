"""Declarations in the files beside a tokenizer: named and added tokens, begin and end of text.

The precedence is that of transformers: entries of special_tokens_map.json replace those of
tokenizer_config.json, but count only if that file has no `added_tokens_decoder`; the same holds for
added_tokens.json. Of generation_config.json and config.json only the end-of-text ids are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.errors import DataError, brief
from data_tools.tokenization.special_tokens import TokenSpec

CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class NamedToken(NamedTuple):
    """Token with a name such as `eos_token`, and the file that declares it."""

    token: TokenSpec
    file: str


class EosId(NamedTuple):
    """End-of-text id, and the file that declares it."""

    id: int
    file: str


class TokenizerConfig(NamedTuple):
    """Declarations of the files beside a tokenizer; all empty if there are none."""

    folder: Path
    named: dict[str, NamedToken]
    """By name: `eos_token`, `pad_token`, ..."""
    extra: tuple[TokenSpec, ...]
    """Additional special tokens."""
    added: dict[int, TokenSpec]
    """Added tokens by id, whether or not the tokenizer's own file has them."""
    added_have_flags: bool
    """Whether `added` declares flags; otherwise those of the tokenizer's own file apply."""
    eos_ids: tuple[EosId, ...]
    tokenizer_class: str | None
    splits_special_tokens: bool
    adds_bos: bool
    is_legacy: bool
    """SentencePiece: whether a space is inserted after every special token."""
    adds_prefix_space: bool


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read the files beside a tokenizer.

    Raises:
        DataError: a file is not a JSON object, or an entry has the wrong type.
    """
    config = _read(folder / CONFIG)
    sources = dict.fromkeys(config, CONFIG)
    added: dict[int, TokenSpec] = {}
    if "added_tokens_decoder" in config:
        added = _added_with_flags(folder / CONFIG, config["added_tokens_decoder"])
    else:
        others = _read(folder / _MAP)
        config |= others
        sources |= dict.fromkeys(others, _MAP)
    named = {
        name: NamedToken(token, sources[name])
        for name, value in config.items()
        if _is_role(name, value) and (token := _token(folder / sources[name], name, value))
    }
    extra = _extra(folder, config, sources)
    if "added_tokens_decoder" not in config:
        special = {role.token.content for role in named.values()} | {t.content for t in extra}
        added = _added_without_flags(folder / _ADDED, special)
    name = config.get("tokenizer_class")
    return TokenizerConfig(
        folder,
        named,
        extra,
        added,
        added_have_flags="added_tokens_decoder" in config,
        eos_ids=tuple(_eos_ids(folder)),
        tokenizer_class=name.removesuffix("Fast") if isinstance(name, str) else None,
        splits_special_tokens=config.get("split_special_tokens") is True,
        adds_bos=config.get("add_bos_token") is True,
        is_legacy=config.get("legacy") is True,
        adds_prefix_space=config.get("add_prefix_space") is True,
    )


def tokens_to_add(declared: TokenizerConfig, own: Mapping[str, TokenSpec]) -> list[TokenSpec]:
    """Return the tokens that the declarations add to the tokenizer's own file, or change in it.

    `own`: added tokens of that file by content. Named tokens are special.
    """
    tokens = {token.content: token for _, token in sorted(declared.added.items())}
    if not declared.added_have_flags:
        tokens = {content: own.get(content, token) for content, token in tokens.items()}
    for name in (*(role.token for role in declared.named.values()), *declared.extra):
        known = tokens.get(name.content) or own.get(name.content) or name
        tokens[name.content] = known._replace(special=True)
    return [token for token in tokens.values() if own.get(token.content) != token]


def _is_role(name: str, value: Any) -> bool:
    if name.removesuffix("_token") in _ROLES and name.endswith("_token"):
        return value is not None
    # Model-specific names such as image_token; other settings with this suffix may not be text.
    return name.endswith("_token") and isinstance(value, str)


def _extra(folder: Path, config: dict[str, Any], sources: dict[str, str]) -> tuple[TokenSpec, ...]:
    name = next((name for name in reversed(_LISTS) if config.get(name)), None)
    if name is None:
        return ()
    values = config[name]
    values = list(values.values()) if isinstance(values, dict) else values
    path = folder / sources[name]
    if not isinstance(values, list):
        raise DataError(f"{path}: {name} is not a list of tokens; correct it")
    return tuple(_token(path, name, value) for value in values)


def _token(path: Path, name: str, value: Any) -> TokenSpec:
    """Parse a token given as text, or as an object with `content` and flags."""
    if isinstance(value, str):
        return TokenSpec(value)
    flags = value if isinstance(value, dict) else {}
    content = flags.get("content")
    if not isinstance(content, str):
        raise DataError(f"{path}: {name} is {str(value)[:60]}, not a token; correct it")
    wanted = {flag: flags[flag] is True for flag in TokenSpec._fields[1:] if flag in flags}
    return TokenSpec(content, **wanted)


def _added_with_flags(path: Path, entries: Any) -> dict[int, TokenSpec]:
    if not isinstance(entries, dict):
        raise DataError(f"{path}: added_tokens_decoder is not an object; correct it")
    tokens = {}
    for key, value in entries.items():
        token = _token(path, f"added_tokens_decoder.{key}", value)
        special = isinstance(value, dict) and value.get("special") is True
        tokens[_id(path, "added_tokens_decoder", key)] = token._replace(
            special=special,
            # The default of `AddedToken`.
            normalized=token.normalized if "normalized" in value else not special,
        )
    return tokens


def _added_without_flags(path: Path, special: set[str]) -> dict[int, TokenSpec]:
    return {
        _id(path, content, key): TokenSpec(
            content, special=content in special, normalized=content not in special
        )
        for content, key in _read(path).items()
    }


def _id(path: Path, entry: str, key: Any) -> int:
    try:
        number = int(key)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise DataError(f"{path}: {entry}: {str(key)[:60]!r} is not a token id; correct it")
    return number


def _eos_ids(folder: Path) -> Iterator[EosId]:
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        for number in ids if isinstance(ids, list) else [ids]:
            if isinstance(number, int) and not isinstance(number, bool):
                yield EosId(number, name)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = brief(error)
        raise DataError(f"{path}: not a JSON object ({reason}); repair it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object; repair it")
    return content
