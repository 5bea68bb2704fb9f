"""Base class of both families' configurations in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from models.dynamic.config import DynamicConfig
from models.dynamic.hf.names import BASE_DEFAULTS
from models.hf.decoder_config import DecoderPreTrainedConfig
from models.hf.llama_names import check_sizes, decoder_settings


class DynamicHFConfig(DecoderPreTrainedConfig):
    """Sizes under the names of Qwen2, how tokens are routed under the project's own."""

    settings_class = DynamicConfig

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
        """Check that the weights of the Qwen2 model with this config.json fit.

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
