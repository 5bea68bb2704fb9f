"""Generation settings declared by a Hugging Face directory, kept beside the imported weights.

The tokens that begin and end a text and the sampling settings are no part of a family's
configuration; they travel with the weights from from-hf to to-hf, also through runs initialised
from an import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.checkpoint import StoredModel, origin_of
from parallel.checkpoint.weights import WeightsError
from parallel.checkpoint.weights_reader import find_weights

GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FILE = "hugging_face.json"

Ids = int | list[int] | None


class Declared(NamedTuple):
    """`ids`: those of TOKEN_IDS that config.json names. `generation`: the contents of
    generation_config.json, None where there is none."""

    ids: dict[str, Ids]
    generation: dict[str, Any] | None


NOTHING = Declared({}, None)


class OwnTokens(NamedTuple):
    """The end, begin and padding tokens of a tokenizer and the training data; None if missing."""

    end: int | None = None
    begin: int | None = None
    pad: int | None = None


def read_declared(directory: Path, contents: Mapping[str, Any]) -> Declared:
    """Read the declarations of a Hugging Face directory; `contents`: of its config.json.

    Raises:
        ValueError: an invalid id, or a damaged generation_config.json.
    """
    path = directory / GENERATION_CONFIG
    generation = _read(path) if path.is_file() else None
    for where, entries in (("config.json", contents), (GENERATION_CONFIG, generation or {})):
        for name in TOKEN_IDS:
            if not _is_ids(entries.get(name)):
                raise ValueError(
                    f"{directory / where}: {name}={entries[name]!r} is no token id; correct it"
                )
    return Declared({n: contents[n] for n in TOKEN_IDS if n in contents}, generation)


def write_declared(checkpoint: Path, declared: Declared) -> None:
    """Write the declarations into the directory of a checkpoint."""
    if declared != NOTHING:
        text = json.dumps(declared._asdict(), indent=1, sort_keys=True)
        (checkpoint / _FILE).write_text(text + "\n", encoding="ascii")


def declared_of(stored: StoredModel) -> tuple[Declared, list[str]]:
    """The declarations at the source of a checkpoint's weights, and remarks for the user.

    A run's checkpoint is traced back to the one that it was initialised from
    (`training.init_from`).

    Raises:
        ValueError: a file with it is damaged.
    """
    checkpoint = stored.weights.parent
    seen: set[Path] = set()
    while checkpoint not in seen:
        seen.add(checkpoint)
        if (checkpoint / _FILE).is_file():
            return Declared(**_read(checkpoint / _FILE)), []
        origin = origin_of(checkpoint)
        if origin is None:
            break
        try:
            checkpoint = find_weights(Path(origin)).parent
        except WeightsError:
            return NOTHING, [
                f"training.init_from={origin} is not there any more: what it declared about the "
                "tokens that end a text and about sampling is not exported"
            ]
    return NOTHING, []


class Contents(NamedTuple):
    """`ids`: all of TOKEN_IDS for config.json. `generation`: of generation_config.json."""

    ids: dict[str, Ids]
    generation: dict[str, Any]


def generation_contents(declared: Declared, own: OwnTokens) -> Contents:
    """The exported generation settings, from `declared` and the tokens of the exported tokenizer.

    Declared settings are kept, and the end token of training is always among the end tokens. An id
    that neither names is None, since transformers would insert a default otherwise.
    """
    # A pad_token_id of config.json is more: transformers does not train that row.
    named: dict[str, Ids] = dict(zip(TOKEN_IDS, (own.begin, own.end, None), strict=True))
    ids = named | declared.ids
    ids["eos_token_id"] = _with_end(ids["eos_token_id"], own.end)
    if declared.generation is None:
        texts = {"pad_token_id": own.pad} | {n: v for n, v in ids.items() if v is not None}
        return Contents(ids, {name: value for name, value in texts.items() if value is not None})
    generation = dict(declared.generation)
    if own.end is not None:
        generation["eos_token_id"] = _with_end(generation.get("eos_token_id"), own.end)
    return Contents(ids, generation)


def _with_end(ends: Ids, eod_id: int | None) -> Ids:
    known = ends if isinstance(ends, list) else [ends]
    if eod_id is None or eod_id in known:
        return ends
    return eod_id if ends is None else [eod_id, *(i for i in known if i is not None)]


def _is_ids(value: Any) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return value is None or all(type(v) is int for v in values)


def _read(path: Path) -> dict[str, Any]:
    try:
        contents: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object; repair it or remove it") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a JSON object; repair it or remove it")
    return contents
