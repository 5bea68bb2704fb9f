"""Registry of model families, imported lazily."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydantic import BaseModel

    from models.base import ModelFamily


class _Entry(NamedTuple):
    """`package.config` holds `config_class` (no torch), `package.model` the family, `instance`."""

    package: str
    config_class: str
    instance: str = "FAMILY"


_FAMILIES = {
    "agiformer": _Entry("models.agiformer", "AgiformerConfig"),
    "amrpa": _Entry("models.amrpa", "AMRPALlamaConfig"),
    "daria_former": _Entry("models.daria_former", "DariaFormerConfig"),
    "dart": _Entry("models.dart", "DARTConfig"),
    "dtf": _Entry("models.dynamic", "DTFConfig", "DTF"),
    "llama": _Entry("models.llama", "LlamaConfig"),
    "mod": _Entry("models.dynamic", "MoDConfig", "MOD"),
}


def family_names() -> tuple[str, ...]:
    """Every name that `get_family` knows."""
    return tuple(_FAMILIES)


def get_config_class(name: str) -> type[BaseModel]:
    """The configuration class of a family, without importing torch.

    Raises:
        ValueError: no family has this name.
    """
    entry = _entry(name)
    return getattr(importlib.import_module(f"{entry.package}.config"), entry.config_class)


def get_family(name: str) -> ModelFamily:
    """The family of this name, with its layers imported.

    Raises:
        ValueError: no family has this name.
    """
    entry = _entry(name)
    family: ModelFamily = getattr(importlib.import_module(f"{entry.package}.model"), entry.instance)
    return family


def model_type_owners() -> dict[str, ModelFamily]:
    """`model_type` of a config.json -> the family that reads and writes it. Imports all families.

    Raises:
        ValueError: two families claim the same one.
    """
    owners: dict[str, ModelFamily] = {}
    for family in map(get_family, _FAMILIES):
        for model_type in () if family.hf is None else family.hf.model_types:
            owner = owners.setdefault(model_type, family)
            if owner is not family:
                raise ValueError(
                    f"model_type={model_type!r} is claimed by the families {owner.name} and "
                    f"{family.name}, so that a directory could be either; leave it to one of them: "
                    "a family that transformers does not have declares hf=custom_code(...)"
                )
    return owners


def _entry(name: str) -> _Entry:
    if isinstance(name, str) and name in _FAMILIES:
        return _FAMILIES[name]
    nearest = difflib.get_close_matches(str(name), _FAMILIES, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(_FAMILIES)}"
    raise ValueError(f"model.family={name!r} is not a known family; {hint}")
