"""Families without a class in transformers: exported directories include their code.

A family whose layers take tokens alone declares its form in one line, `hf=custom_code(FooConfig,
layer_specs)`: `FooHFConfig` and `FooForCausalLM` are derived from its settings and layers, in this
process and in the exported files alike. One with more inputs or settings of its own writes the two
classes as modules and names them in `own_code`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from models.base import BaseModelMapping, HFMapping
from models.checkpoint import parameter_table
from models.common.config import DecoderConfig
from models.hf.code_bundle import CodeFile, code_of
from models.registry import get_family
from parallel.carry import LayerSpec, ties

_CONFIGURATION = '''"""The configuration of a {family} model in transformers."""

from {base_module} import {base}
from {settings_module} import {settings}

{prefix}HFConfig = {base}.of({settings}{aliases})
'''
_MODELING = '''"""A {family} model in transformers."""

from models.hf.modeling import FamilyForCausalLM
from {layers_module} import {layers}
from {package}.configuration import {prefix}HFConfig

{prefix}ForCausalLM = FamilyForCausalLM.of({prefix}HFConfig, {layers})
'''


def custom_code(
    settings_class: type[BaseModel],
    layer_specs: Callable[[Any], list[LayerSpec]],
    *,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> HFMapping:
    """The form of a family whose first layer takes `TokenInputs`.

    Both are defined at the top level of modules of the family. A `DecoderConfig` has its sizes
    under the names of Llama, any other configuration every setting under its own name. `aliases`:
    names that transformers asks for (`hidden_size`, `num_hidden_layers`, `max_position_embeddings`)
    -> what the family calls them, where it differs.
    """
    names = _template_names(settings_class, layer_specs, aliases)
    family, package = names["family"], names["package"]

    @cache
    def config_class() -> Any:
        base = getattr(importlib.import_module(names["base_module"]), names["base"])
        return base.of(settings_class, aliases)

    @cache
    def model_class() -> Any:
        auto = importlib.import_module("models.hf.auto")
        return auto.register(auto.FamilyForCausalLM.of(config_class(), layer_specs))

    code = {
        f"configuration_{family}.py": CodeFile(
            f"{package}.configuration", _CONFIGURATION.format(**names)
        ),
        f"modeling_{family}.py": CodeFile(f"{package}.modeling", _MODELING.format(**names)),
    }
    return _mapping(family, config_class, model_class, code)


def _template_names(
    settings_class: type[BaseModel],
    layer_specs: Callable[[Any], list[LayerSpec]],
    aliases: Mapping[str, str],
) -> dict[str, str]:
    """The fields of the templates of both modules."""
    is_decoder = issubclass(settings_class, DecoderConfig)
    return {
        "family": settings_class.model_fields["family"].default,
        "package": settings_class.__module__.rpartition(".")[0],
        "prefix": settings_class.__name__.removesuffix("Config"),
        "settings": settings_class.__name__,
        "settings_module": settings_class.__module__,
        "layers": layer_specs.__name__,
        "layers_module": layer_specs.__module__,
        "aliases": f", {dict(aliases)}" if aliases else "",
        "base": "DecoderPreTrainedConfig" if is_decoder else "FamilyPreTrainedConfig",
        "base_module": "models.hf.decoder_config" if is_decoder else "models.hf.config",
    }


def own_code(
    family: str,
    config_module: str,
    config_class: str,
    *,
    name: Callable[[str], str] = "model.{}".format,
    base: BaseModelMapping | None = None,
    files: Mapping[str, CodeFile] = MappingProxyType({}),
) -> HFMapping:
    """The form of a family with `config_class` in `config_module` (`models.<package>.hf.config...`)
    and its model beside it.

    `models.<package>.hf.auto` registers both. `name`: our name of a parameter or buffer -> its name
    in files. `base`: the mapping from the base model that the family extends. `files`: more code
    for the directory, by path.
    """

    def theirs() -> Any:
        return getattr(importlib.import_module(config_module), config_class)

    def model_class() -> Any:
        package = config_module.rpartition(".")[0]
        return getattr(importlib.import_module(f"{package}.auto"), theirs().model_class)

    code = {**code_of(family, config_module), **files}
    return _mapping(family, theirs, model_class, code, name=name, base=base)


def _mapping(
    family: str,
    config_class: Callable[[], Any],
    model_class: Callable[[], Any],
    code: Mapping[str, CodeFile],
    *,
    name: Callable[[str], str] = "model.{}".format,
    base: BaseModelMapping | None = None,
) -> HFMapping:
    def to_config(config: Any) -> dict[str, Any]:
        contents = config_class().from_settings(config).to_diff_dict()
        return contents | {"architectures": [config_class().model_class]}

    def from_config(contents: Mapping[str, Any]) -> Any:
        return config_class()(**contents).settings()

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
        code=code,
        model_class=model_class,
        base=base,
    )
