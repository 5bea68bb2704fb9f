"""A family's settings as a configuration of transformers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ValidationError
from transformers import PreTrainedConfig

# What transformers or a conversion writes into a config.json beside the fields of its base class.
_FOREIGN_KEYS = {
    "model_type",
    "auto_map",
    "torch_dtype",
    "name_or_path",
    "num_labels",
    "use_cache",
    "quantization_config",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "tokenizer_class",
}


# Names that transformers expects of every causal model -> the names of families.
_STANDARD_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "tie_word_embeddings": "tie_embeddings",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")


class FamilyPreTrainedConfig(PreTrainedConfig):
    """Every setting of `settings_class` as an attribute, under its own name unless a subclass
    defines `attributes` and `values`.

    Subclasses define `model_type` (the family's name), `settings_class`, `model_class` (the name of
    the model that a directory is loaded as) and `attribute_map` (other names -> the attributes);
    `of` derives one.

    Raises:
        ValueError: a key that neither the family nor transformers knows, or a wrong value.
    """

    settings_class: ClassVar[type[BaseModel]] = BaseModel
    model_class: ClassVar[str] = ""

    def __post_init__(self, **kwargs: Any) -> None:
        given = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        names = self.attribute_names()
        rest = {name: value for name, value in given.items() if name not in names}
        _check_foreign(rest, [*names, *self.attribute_map], family=self.model_type)
        values = self.values({name: given[name] for name in names if name in given})
        rest["auto_map"] = self._auto_map()
        super().__post_init__(**self.attributes(self._validated(values)), **rest)

    @classmethod
    def of(
        cls, settings_class: type[BaseModel], aliases: Mapping[str, str] = MappingProxyType({})
    ) -> type[Self]:
        """The configuration of a family: `FooHFConfig` for its `FooConfig`.

        `aliases`: names that transformers asks for -> what the family calls them.

        Raises:
            ValueError: the family has no setting for a name that transformers asks for.
        """
        prefix = settings_class.__name__.removesuffix("Config")
        settings = settings_class.model_fields
        own = {theirs: ours for theirs, ours in _STANDARD_NAMES.items() if ours in settings}
        names = {**(cls.attribute_map or own), **aliases}
        for name in _REQUIRED:
            if not {name, names.get(name)} & {*settings, *names.values()}:
                raise ValueError(
                    f"{settings_class.__name__} has no setting {name}, which transformers asks "
                    f"for; name the one that it is, as in aliases={{{name!r}: ...}}"
                )
        members = {
            "__module__": __name__,
            "__doc__": f"The settings of `{settings_class.__name__}` as attributes.",
            "model_type": settings["family"].default,
            "model_class": f"{prefix}ForCausalLM",
            "settings_class": settings_class,
            "attribute_map": names,
        }
        return type(f"{prefix}HFConfig", (cls,), members)

    @classmethod
    def from_settings(cls, settings: BaseModel) -> Self:
        """The configuration with these settings."""
        return cls(**cls.attributes(settings))

    @classmethod
    def attribute_names(cls) -> list[str]:
        """The attributes that `values` takes."""
        return [name for name in cls.settings_class.model_fields if name != "family"]

    @classmethod
    def attributes(cls, settings: BaseModel) -> dict[str, Any]:
        """The attributes that hold these settings."""
        return settings.model_dump(exclude={"family"})

    @classmethod
    def values(cls, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The reverse: values for `settings_class`."""
        return dict(attributes)

    def settings(self) -> Any:
        """The family's own configuration, with its checks.

        Raises:
            ValueError: an attribute has been set to a wrong value.
        """
        present = [name for name in self.attribute_names() if hasattr(self, name)]
        return self._validated(self.values({name: getattr(self, name) for name in present}))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the code that it names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # A class that was itself loaded from such a directory is copied by transformers.
        if type(self).__module__.split(".")[0] == "models":
            # Not at the top: exported files hold this module, and not the writer of exports.
            from models.hf.code_bundle import write_files
            from models.registry import get_family

            write_files(get_family(self.model_type).require_hf().code, Path(save_directory))

    def _auto_map(self) -> dict[str, str]:
        return {
            "AutoConfig": f"configuration_{self.model_type}.{type(self).__name__}",
            "AutoModelForCausalLM": f"modeling_{self.model_type}.{self.model_class}",
        }

    @classmethod
    def _validated(cls, values: dict[str, Any]) -> Any:
        try:
            return cls.settings_class.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            where = f"{key}={first['input']!r}: " if key else ""
            raise ValueError(f"{cls.model_type}: {where}{first['msg']}") from None


def _check_foreign(values: dict[str, Any], names: list[str], *, family: str) -> None:
    """Refuse unknown keys, which transformers itself would keep unread."""
    known = {field.name for field in fields(PreTrainedConfig)} | _FOREIGN_KEYS
    for name in values:
        if name in known or name.startswith("_") or name.endswith("_token_id"):
            continue
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "remove it"
        raise ValueError(f"{name}={values[name]!r} is no setting of a {family} model; {hint}")
