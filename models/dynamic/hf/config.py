"""What the configurations of both families have in common in transformers: Qwen2's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel

from models.dynamic.config import DynamicConfig
from models.dynamic.hf.names import BASE_DEFAULTS
from models.hf.config import FamilyPreTrainedConfig
from models.hf.llama_names import (
    FIXED_SETTINGS,
    SETTING_NAMES,
    check_sizes,
    decoder_settings,
    rope_parameters,
    rope_scaling,
)

_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")


class DynamicHFConfig(FamilyPreTrainedConfig):
    """Sizes under the names of Qwen2, how tokens are routed under the project's own.

    The project's names of the sizes are known too.
    """

    settings_class = DynamicConfig
    attribute_map: ClassVar[dict[str, str]] = {
        ours: theirs for ours, theirs in SETTING_NAMES.items() if ours != theirs
    }

    @classmethod
    def from_base(cls, contents: Mapping[str, Any], changes: Mapping[str, Any]) -> Self:
        """The configuration of a model that begins with the weights of a Qwen2 model.

        `contents`: of its config.json. `changes`: other settings than its own.

        Raises:
            ValueError: it is another kind of model, or its weights would not fit.
        """
        known = cls.settings_class.model_fields
        defaults = {name: value for name, value in BASE_DEFAULTS.items() if name in known}
        given = {cls.attribute_map.get(name, name): value for name, value in changes.items()}
        theirs = cls._base_values(contents)
        config = cls.from_settings(cls._validated({**theirs, **defaults, **cls.values(given)}))
        config.check_base(contents)
        return config

    def check_base(self, contents: Mapping[str, Any]) -> None:
        """Whether the weights of the Qwen2 model with this config.json fit.

        Raises:
            ValueError: they do not.
        """
        theirs = self._validated(self._base_values(contents))
        check_sizes(self.settings(), theirs, "config.json of the base model")

    @classmethod
    def _base_values(cls, contents: Mapping[str, Any]) -> dict[str, Any]:
        if contents.get("model_type") != "qwen2":
            raise ValueError(
                f"model_type={contents.get('model_type')!r}: a {cls.model_type} model begins with "
                "the weights of a qwen2 model; give one, or build the model from its configuration"
            )
        return decoder_settings(contents, family=cls.model_type)

    @classmethod
    def attribute_names(cls) -> list[str]:
        names = [SETTING_NAMES.get(n, n) for n in super().attribute_names() if n not in _ROPE]
        return [*names, *_ROPE[:2], *FIXED_SETTINGS]

    @classmethod
    def attributes(cls, settings: BaseModel) -> dict[str, Any]:
        own = settings.model_dump(exclude={"family", *_ROPE})
        attributes = {SETTING_NAMES.get(name, name): value for name, value in own.items()}
        if attributes["head_dim"] is None:
            del attributes["head_dim"]  # Qwen2 has none then
        assert isinstance(settings, DynamicConfig)
        return attributes | {"rope_parameters": rope_parameters(settings)}

    @classmethod
    def values(cls, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from attributes; `rope_parameters` may be given as `rope_theta` alone.

        Raises:
            ValueError: a setting of Qwen2 that the family does not have.
        """
        given = dict(attributes)
        for name, required in FIXED_SETTINGS.items():
            if given.pop(name, required) != required:
                raise ValueError(
                    f"{name}={attributes[name]!r}: the {cls.model_type} family only has "
                    f"{required!r}; leave it out"
                )
        rope = given.pop("rope_parameters", None)
        if rope is not None:
            if given.setdefault("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
                raise ValueError(
                    f"rope_theta={given['rope_theta']} is not that of rope_parameters={dict(rope)};"
                    " change rope_parameters"
                )
            given["rope_scaling"] = rope_scaling(rope, family=cls.model_type)
        ours = {theirs: ours for ours, theirs in SETTING_NAMES.items()}
        return {ours.get(name, name): value for name, value in given.items()}

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json; `rope_theta` also where older readers look for it."""
        contents = super().to_dict()
        if "rope_parameters" in contents:  # not while transformers asks for defaults
            contents["rope_theta"] = contents["rope_parameters"]["rope_theta"]
        return contents
