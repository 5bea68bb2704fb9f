"""Families that transformers has no equal of: they keep their names and bring their code along."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from models.base import HFMapping
from models.checkpoint import parameter_table
from models.hf_bundle import code_of
from models.registry import get_family
from parallel.carry import ties


def own_mapping(family: str, config_class: str) -> HFMapping:
    """Our parameter names under `model.`, our settings as they are.

    `config_class`: the configuration for transformers in `models.<family>.hf_config`.
    """

    def theirs() -> Any:
        return getattr(importlib.import_module(f"models.{family}.hf_config"), config_class)

    def to_config(config: Any) -> dict[str, Any]:
        contents = theirs().from_settings(config).to_diff_dict()
        return contents | {"architectures": [theirs().model_class]}

    def from_config(contents: Mapping[str, Any]) -> Any:
        return theirs()(**contents).settings()

    def names(config: Any) -> dict[str, str]:
        return {name: f"model.{name}" for name in parameter_table(get_family(family), config)}

    def tied(config: Any) -> dict[str, str]:
        specs = get_family(family).layer_specs(config)
        return {f"model.{t.layer}.{t.path}": f"model.{t.target}" for t in ties(specs)}

    return HFMapping(
        model_types=(family,),
        to_config=to_config,
        from_config=from_config,
        names=names,
        tied=tied,
        derived=r"(?!)",  # nothing
        code=code_of(family),
    )
