"""Other spellings of settings: each stands for one setting of the schema, its owner.

Only owners are in a resolved configuration. What is chosen by name is beside this file: corpora
(`corpus_catalog`) and the sizes of published models (`model_presets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pretrain.config.compat.corpus_catalog import resolve_corpora
from pretrain.config.compat.model_presets import resolve_model
from pretrain.config.errors import show
from pretrain.errors import ConfigError


class Alias(NamedTuple):
    """`owner` in dotted form; `values`: what the other spelling says -> what the owner says."""

    owner: str
    values: Mapping[Any, Any] | None = None


_PRECISIONS = {"bf16": "bf16", "fp8": "fp8", "no": "fp32"}
ALIASES = {
    "data.block_size": Alias("data.sequence_length"),
    "data.max_length": Alias("data.sequence_length"),
    "model.capacity": Alias("model.capacity_gamma"),
    "model.m_cu_init": Alias("model.cu_detection_multiplier_init"),
    "model.num_attention_heads": Alias("model.num_heads"),
    "model.num_hidden_layers": Alias("model.num_layers"),
    "model.num_key_value_heads": Alias("model.num_kv_heads"),
    "model.o_ce_init": Alias("model.ce_criterion_offset_init"),
    "system.compile": Alias("training.compile"),
    "system.mixed_precision": Alias("training.precision", _PRECISIONS),
    "training.compile_model": Alias("training.compile"),
    "training.gradient_checkpointing": Alias(
        "training.activation_recomputation", {True: "full", False: "none"}
    ),
    "training.mixed_precision": Alias("training.precision", _PRECISIONS),
    "training.num_epochs": Alias("training.max_epochs"),
}
# Attention always runs in a fused kernel where there is one: the only value is what happens anyway.
_ALWAYS_TRUE = ("model.use_flash_attention", "training.use_flash_attention")
# Keys of lr_multipliers are parts of parameter names, and every name contains the empty text.
_EVERYTHING_ELSE = "base_model"


def resolve_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every alias replaced by its owner.

    Raises:
        ConfigError: alias and owner differ, or a value has no equal.
    """
    resolved = {
        name: dict(section) if isinstance(section, Mapping) else section
        for name, section in values.items()
    }
    if isinstance(resolved.get("training"), dict):
        _flatten_optimizer(resolved["training"])
    for name, alias in ALIASES.items():
        _rename(resolved, name, alias)
    resolve_model(resolved)  # after: what is said under another name wins over a base model's size
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
    """`training.optimizer` as a section of numbers stands for settings of `training`."""
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
    """Remove a setting and return it; None where it is not given."""
    section, _, key = name.partition(".")
    settings = values.get(section)
    return settings.pop(key, None) if isinstance(settings, dict) else None
