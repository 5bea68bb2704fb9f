"""Which settings may differ between a checkpoint and the run that continues from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Change = Literal["free", "training", "layout", "fixed"]

_ABSENT = "(absent)"

# free: does not touch what is computed. training: takes effect from the next step on, so the run
# may continue but is no longer the same experiment. layout: the same mathematics on another
# arrangement of ranks. fixed: the checkpoint is of another run. `section.*` covers a section.
RULES: dict[str, Change] = {
    "run_dir": "free",
    "resume": "free",
    "model.*": "fixed",
    "data.kind": "fixed",
    "data.train": "training",  # the loader continues each source where its ledger stands
    "data.validation": "free",
    "data.tokenizer": "fixed",
    "data.documents": "fixed",
    "data.json_key": "fixed",
    "data.sequence_length": "fixed",
    "data.stages": "training",
    "data.reset_at_documents": "fixed",
    "data.fim.*": "training",
    "data.cache_dir": "free",
    "data.num_workers": "free",
    "training.max_steps": "training",
    "training.max_tokens": "training",
    "training.max_epochs": "training",
    # Their product with the number of data ranks is what stays (samples_per_step).
    "training.batch_size": "layout",
    "training.gradient_accumulation_steps": "layout",
    "training.lr": "training",
    "training.schedule": "training",
    "training.warmup_steps": "training",
    "training.decay_steps": "training",
    "training.min_lr_ratio": "training",
    # Where DeepSpeed's own files hold the optimizer state it restores the parameter groups too, so
    # that new values of these would be read and then lost.
    "training.lr_multipliers": "fixed",
    "training.optimizer": "fixed",
    "training.betas": "fixed",
    "training.eps": "fixed",
    "training.weight_decay": "fixed",
    "training.grad_clip": "training",
    "training.z_loss": "training",
    "training.precision": "fixed",
    "training.fp8_recipe": "fixed",
    "training.activation_recomputation": "free",
    "training.init_from": "free",
    "training.compile": "free",
    "training.seed": "fixed",
    "training.log_interval": "free",
    "parallel.*": "layout",
    "checkpoint.*": "free",
    "evaluation.*": "free",
    "stability.*": "training",
    "watchdog.*": "free",
    "logging.*": "free",
}


class Difference(NamedTuple):
    """One setting that differs, and what that means for a resume."""

    key: str
    old: Any
    new: Any
    change: Change

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} in the checkpoint, {self.new!r} now"


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every setting that differs between two resolved configurations, sorted by its key."""
    before, after = _flatten(old), _flatten(new)
    return [
        Difference(key, before.get(key, _ABSENT), after.get(key, _ABSENT), change_of(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def forbidden_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One text, with both values, per setting that makes `new` another run than `old`."""
    return [str(each) for each in config_differences(old, new) if each.change == "fixed"]


def samples_per_step(config: Mapping[str, Any], *, data_size: int) -> int | None:
    """The global batch of a resolved configuration; None if it does not say."""
    training = config.get("training", {})
    sizes = (training.get("batch_size"), training.get("gradient_accumulation_steps"))
    if not all(isinstance(size, int) for size in sizes):
        return None
    return math.prod(sizes) * data_size


def change_of(key: str) -> Change:
    """The rule of a dotted key; a key that no rule knows belongs to another program's file."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for rule in (prefix, f"{prefix}.*"):
            if rule in RULES:
                return RULES[rule]
    return "fixed"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
