"""Resolution of aliases: other spellings are replaced by the settings of the schema, their owners.

A resolved configuration contains only owners. The spellings are data: `compat.spellings`, and
`aliases` of a family's configuration class. Named choices are resolved in `corpus_catalog`
(corpora) and `model_presets` (sizes of published models).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from models.registry import family_names, get_config_class
from pretrain.config.compat.corpus_catalog import resolve_corpora
from pretrain.config.compat.model_presets import preset_of, resolve_model_type
from pretrain.config.compat.spellings import ALIASES, Alias
from pretrain.config.errors import show
from pretrain.errors import ConfigError

# Attention always uses a fused kernel where there is one, so `true` is the only valid value.
_ALWAYS_TRUE = ("model.use_flash_attention", "training.use_flash_attention")
# Keys of lr_multipliers are substrings of parameter names; the empty one matches every name.
_EVERYTHING_ELSE = "base_model"


def resolve_aliases(
    values: Mapping[str, Any], *, given: Collection[str] = frozenset()
) -> dict[str, Any]:
    """Replace every alias in a configuration by its owner.

    `given`: dotted keys set on the command line; they win over other spellings in `values`.

    Raises:
        ConfigError: alias and owner differ, or a value has no equal.
    """
    resolved = {
        name: dict(section) if isinstance(section, Mapping) else section
        for name, section in values.items()
    }
    if isinstance(resolved.get("training"), dict):
        _flatten_optimizer(resolved["training"])
    _resolve_model(resolved, given)
    for name in _ALWAYS_TRUE:
        _drop_if_true(resolved, name)
    if not resolved.get("system", True):
        del resolved["system"]
    training = resolved.get("training")
    if isinstance(training, dict):
        _name_the_rest(training)
        _resolve_warmup(training)
    if isinstance(resolved.get("data"), dict):
        resolved["data"] = resolve_corpora(resolved["data"])
    return resolved


def aliases_of(family: Any) -> dict[str, Alias]:
    """All aliases, including those of the family if it is known."""
    if family not in family_names():
        return ALIASES
    own: Mapping[str, str] = getattr(get_config_class(family), "aliases", {})
    return ALIASES | {f"model.{name}": Alias(f"model.{owner}") for name, owner in own.items()}


def _resolve_model(values: dict[str, Any], given: Collection[str]) -> None:
    """Resolve the aliases of all sections and the names of models."""
    resolve_model_type(values)
    preset = preset_of(values)
    model = values.get("model")
    family = {**preset, **model}.get("family") if isinstance(model, dict) else None
    aliases = aliases_of(family)
    _drop_overruled(values, aliases, given)
    for name, alias in aliases.items():
        _rename(values, name, alias)
    if preset:  # after the aliases: a setting under any name wins over the preset
        values["model"] = preset | values["model"]


def _drop_overruled(
    values: dict[str, Any], aliases: Mapping[str, Alias], given: Collection[str]
) -> None:
    """Remove aliases of settings given on the command line."""
    for owner in {alias.owner for alias in aliases.values()}:
        spellings = {owner, *(name for name, alias in aliases.items() if alias.owner == owner)}
        if not spellings.isdisjoint(given):
            for name in spellings.difference(given):
                _take(values, name)


def _rename(values: dict[str, Any], name: str, alias: Alias) -> None:
    given = _take(values, name)
    if given is None:
        return
    value = given
    if alias.values is not None:
        if given not in alias.values:
            raise ConfigError(
                f"{name}={show(given)} is not one of {', '.join(map(repr, alias.values))}, which "
                f"stand for {alias.owner}; choose one of them"
            )
        value = alias.values[given]
    section, _, key = alias.owner.partition(".")
    owners = values.setdefault(section, {})
    if isinstance(owners, dict) and owners.setdefault(key, value) != value:
        raise ConfigError(
            f"{name}={show(given)} is another spelling of {alias.owner}, which is "
            f"{show(owners[key])}; remove one of them"
        )


def _drop_if_true(values: dict[str, Any], name: str) -> None:
    given = _take(values, name)
    if given not in (None, True):
        raise ConfigError(
            f"{name}={show(given)} has no effect: attention always runs in a fused kernel; "
            f"remove it or set {name}=true"
        )


def _flatten_optimizer(training: dict[str, Any]) -> None:
    """Move a `training.optimizer` section to the settings of `training`."""
    section = training.get("optimizer")
    if not isinstance(section, Mapping):
        return
    del training["optimizer"]
    for key, value in section.items():
        if training.setdefault(key, value) != value:
            raise ConfigError(
                f"training.optimizer.{key}={show(value)} is another spelling of training.{key}, "
                f"which is {show(training[key])}; remove one of them"
            )


def _name_the_rest(training: dict[str, Any]) -> None:
    multipliers = training.get("lr_multipliers")
    if isinstance(multipliers, Mapping) and _EVERYTHING_ELSE in multipliers:
        training["lr_multipliers"] = {
            "" if key == _EVERYTHING_ELSE else key: value for key, value in multipliers.items()
        }


def _resolve_warmup(training: dict[str, Any]) -> None:
    ratio = training.pop("warmup_ratio", None)
    if ratio is None:
        return
    steps = training.get("max_steps")
    if not isinstance(ratio, int | float) or not 0 <= ratio < 1 or not isinstance(steps, int):
        raise ConfigError(
            f"training.warmup_ratio={show(ratio)} is a share, 0 to 1, of training.max_steps="
            f"{show(steps)}, which must be set with it; set both or training.warmup_steps"
        )
    warmup = round(ratio * steps)
    if training.setdefault("warmup_steps", warmup) != warmup:
        raise ConfigError(
            f"training.warmup_ratio={show(ratio)} of {steps} steps is another spelling of "
            f"training.warmup_steps, which is {show(training['warmup_steps'])}; remove one of them"
        )


def _take(values: dict[str, Any], name: str) -> Any:
    """Remove a setting and return it; None if it is not given."""
    section, _, key = name.partition(".")
    settings = values.get(section)
    return settings.pop(key, None) if isinstance(settings, dict) else None
