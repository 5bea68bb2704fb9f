"""Families that transformers has no equal of: they bring their code along."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from models.base import BaseModelMapping, HFMapping
from models.checkpoint import parameter_table
from models.hf.code_bundle import code_of
from models.registry import get_family
from parallel.carry import ties


def own_mapping(
    family: str,
    config_module: str,
    config_class: str,
    *,
    name: Callable[[str], str] = "model.{}".format,
    base: BaseModelMapping | None = None,
) -> HFMapping:
    """Our settings as `config_class` of `config_module` (`models.<package>.hf.config...`) has them.

    `name`: of a parameter or buffer in files. `base`: the model that the family grows out of.
    """

    def theirs() -> Any:
        return getattr(importlib.import_module(config_module), config_class)

    def to_config(config: Any) -> dict[str, Any]:
        contents = theirs().from_settings(config).to_diff_dict()
        return contents | {"architectures": [theirs().model_class]}

    def from_config(contents: Mapping[str, Any]) -> Any:
        return theirs()(**contents).settings()

    def names(config: Any) -> dict[str, str]:
        return {ours: name(ours) for ours in parameter_table(get_family(family), config)}

    def tied(config: Any) -> dict[str, str]:
        specs = get_family(family).layer_specs(config)
        return {name(f"{t.layer}.{t.path}"): name(t.target) for t in ties(specs)}

    return HFMapping(
        model_types=(family,),
        to_config=to_config,
        from_config=from_config,
        names=names,
        tied=tied,
        derived=r"(?!)",  # nothing
        code=code_of(family, config_module),
        base=base,
    )
