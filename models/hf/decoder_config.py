"""The settings of a `DecoderConfig` under the names that Llama and Qwen2 have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel

from models.common.config import DecoderConfig
from models.hf.config import FamilyPreTrainedConfig
from models.hf.llama_names import FIXED_SETTINGS, SETTING_NAMES, rope_parameters, rope_scaling

_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")


class DecoderPreTrainedConfig(FamilyPreTrainedConfig):
    """Sizes under the names of Llama and Qwen2, everything else under the family's own.

    The family's own names of the sizes are accepted as well.
    """

    settings_class = DecoderConfig
    attribute_map: ClassVar[dict[str, str]] = {
        ours: theirs for ours, theirs in SETTING_NAMES.items() if ours != theirs
    }

    @classmethod
    def attribute_names(cls) -> list[str]:
        names = [SETTING_NAMES.get(n, n) for n in super().attribute_names() if n not in _ROPE]
        return [*names, *_ROPE, *FIXED_SETTINGS]

    @classmethod
    def attributes(cls, settings: BaseModel) -> dict[str, Any]:
        own = settings.model_dump(exclude={"family", *_ROPE})
        attributes = {SETTING_NAMES.get(name, name): value for name, value in own.items()}
        if attributes["head_dim"] is None:
            del attributes["head_dim"]  # Qwen2 has none then
        assert isinstance(settings, DecoderConfig)
        return attributes | {"rope_parameters": rope_parameters(settings)}

    @classmethod
    def values(cls, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from attributes; `rope_parameters` may be given as `rope_theta` and, like the
        family's own setting and files of transformers 4, as `rope_scaling`.

        Raises:
            ValueError: a setting of Llama or Qwen2 that the family does not have.
        """
        given = dict(attributes)
        for name, required in FIXED_SETTINGS.items():
            if given.pop(name, required) != required:
                raise ValueError(
                    f"{name}={attributes[name]!r}: the {cls.model_type} family only has "
                    f"{required!r}; leave it out"
                )
        rope, older = (given.pop(name, None) for name in ("rope_parameters", "rope_scaling"))
        theta = (rope or {}).get("rope_theta")
        if theta is not None and given.setdefault("rope_theta", theta) != theta:
            raise ValueError(
                f"rope_theta={given['rope_theta']} is not that of rope_parameters={dict(rope)};"
                " change rope_parameters"
            )
        scalings = [rope_scaling(each, family=cls.model_type) for each in (rope, older) if each]
        if len(set(map(str, scalings))) > 1:
            raise ValueError(
                f"rope_scaling={dict(older)} is not that of rope_parameters={dict(rope)}; leave "
                "rope_scaling out"
            )
        if scalings:
            given["rope_scaling"] = scalings[0]
        ours = {theirs: ours for ours, theirs in SETTING_NAMES.items()}
        return {ours.get(name, name): value for name, value in given.items()}

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, with `rope_theta` also at the place of the older format."""
        contents = super().to_dict()
        if "rope_parameters" in contents:  # not while transformers asks for defaults
            contents["rope_theta"] = contents["rope_parameters"]["rope_theta"]
        return contents
