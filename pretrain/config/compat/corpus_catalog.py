"""Corpora by name.

With a catalogue `data.corpora` of NAME -> {train, validation},

    data.dataset_name=a
    data.mixed=true data.dataset_names=[a,b] data.dataset_weights=[0.7,0.3]

stand for `data.train` and `data.validation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.config.errors import nearest, show
from pretrain.errors import ConfigError

_CHOICES = ("dataset_name", "dataset_names", "dataset_weights", "mixed")


def resolve_corpora(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names of corpora in the `data` section by `train` and `validation`.

    Raises:
        ConfigError: names and paths are both given, or a name cannot be resolved.
    """
    if not any(key in data for key in ("corpora", *_CHOICES)):
        return dict(data)
    rest = {key: value for key, value in data.items() if key not in ("corpora", *_CHOICES)}
    catalogue = _catalogue(data.get("corpora", {}))
    names, weights = _chosen(data, list(catalogue))
    for split in ("train", "validation"):
        if split in rest:
            raise ConfigError(
                f"data.{split}={show(rest[split])} and data.dataset_name(s) both say what is read; "
                "remove one of them"
            )
    for name in names:
        if name not in catalogue:
            guess = nearest(name, catalogue)
            remedy = f"did you mean {guess!r}?" if guess else f"set data.corpora.{name}.train=PATH"
            raise ConfigError(
                f"dataset {name!r} is not in data.corpora, which has "
                f"{', '.join(catalogue) or 'nothing'}; {remedy}"
            )
    rest["train"] = [
        {"name": name, "path": catalogue[name]["train"], "weight": weight}
        for name, weight in zip(names, weights, strict=True)
    ]
    rest["validation"] = [
        {"name": name, "path": catalogue[name]["validation"]}
        for name in names
        if "validation" in catalogue[name]
    ]
    return rest


def _catalogue(corpora: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(corpora, Mapping):
        raise ConfigError(f"data.corpora={show(corpora)} must map names to their paths; correct it")
    for name, paths in corpora.items():
        known = isinstance(paths, Mapping) and "train" in paths
        if not known or set(paths) - {"train", "validation"}:
            raise ConfigError(
                f"data.corpora.{name}={show(paths)} must have `train` and may have `validation`, "
                "each a path; correct it"
            )
    return {name: dict(paths) for name, paths in corpora.items()}


def _chosen(data: Mapping[str, Any], known: list[str]) -> tuple[list[str], list[float]]:
    """Names and weights of the chosen corpora; `mixed` selects between both forms."""
    mixed = data.get("mixed", "dataset_names" in data)
    if not isinstance(mixed, bool):
        raise ConfigError(f"data.mixed={show(mixed)} must be true or false; correct it")
    wanted = "dataset_names" if mixed else "dataset_name"
    for key in ("dataset_name",) if mixed else ("dataset_names", "dataset_weights"):
        if key in data and "mixed" not in data:
            raise ConfigError(
                f"data.{key}={show(data[key])} has no effect beside data.{wanted}; "
                "remove it or set data.mixed"
            )
    if wanted not in data:
        raise ConfigError(
            f"data.{wanted} is missing, and data.corpora has {', '.join(known) or 'none yet'}; set "
            "it to names of data.corpora"
        )
    if not mixed:
        return [str(data[wanted])], [1.0]
    return _names_and_weights(data)


def _names_and_weights(data: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    names = data["dataset_names"]
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(f"data.dataset_names={show(names)} must be a list of names; correct it")
    weights = data.get("dataset_weights", [1.0] * len(names))
    if not isinstance(weights, list | tuple) or len(weights) != len(names):
        raise ConfigError(
            f"data.dataset_weights={show(weights)} must be a list of {len(names)} numbers, one for "
            f"each of data.dataset_names={show(list(names))}; correct one of them"
        )
    return list(map(str, names)), list(weights)
