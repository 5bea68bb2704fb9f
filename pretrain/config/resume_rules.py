"""Rules for settings that differ between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pretrain.config.input_checks import leaves

Change = Literal["free", "training", "layout", "fixed"]

MISSING = "(absent)"

# free: does not change what is computed. training: takes effect from the next step on, so the run
# may continue but is no longer the same experiment. layout: the same mathematics on another
# arrangement of ranks. fixed: the checkpoint is of another run. `section.*` covers a section.
RULES: dict[str, Change] = {
    "run_dir": "free",
    "resume": "free",
    "model.*": "fixed",
    "data.kind": "fixed",
    "data.train": "training",  # the loader continues each source from its ledger
    "data.validation": "free",
    "data.tokenizer": "fixed",
    "data.eod": "free",  # the actual end of documents is compared when a checkpoint is found
    "data.documents": "fixed",
    "data.json_key": "fixed",
    "data.sequence_length": "fixed",
    "data.stages": "training",
    "data.reset_at_documents": "fixed",
    "data.fim.*": "training",
    "data.cache_dir": "free",
    "data.num_workers": "free",
    "data.warn_epochs": "free",
    "training.max_steps": "training",
    "training.max_tokens": "training",
    "training.max_epochs": "training",
    # Their product with the number of data ranks is the batch (samples_per_step).
    "training.batch_size": "layout",
    "training.gradient_accumulation_steps": "layout",
    "training.batch_ramp": "training",
    "training.lr": "training",
    "training.schedule": "training",
    "training.warmup_steps": "training",
    "training.decay_steps": "training",
    "training.min_lr_ratio": "training",
    # DeepSpeed's own files also restore the parameter groups, which would silently override new
    # values of these.
    "training.lr_multipliers": "fixed",
    "training.optimizer": "fixed",
    "training.betas": "fixed",
    "training.eps": "fixed",
    "training.weight_decay": "fixed",
    "training.grad_clip": "training",
    "training.z_loss": "training",
    "training.precision": "fixed",
    "training.fp8_recipe": "fixed",
    "training.fp8_backend": "training",
    "training.activation_recomputation": "free",
    "training.logits_parts": "free",
    "training.init_from": "free",
    "training.init_from_changes": "free",
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
    """A setting that differs, and the rule for it at a resume."""

    key: str
    old: Any
    new: Any
    change: Change

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} in the checkpoint, {self.new!r} now"


Prints = Mapping[str, str]


def config_differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    old_prints: Prints = MappingProxyType({}),
    new_prints: Prints = MappingProxyType({}),
) -> list[Difference]:
    """Every setting that differs between two resolved configurations, sorted by its key.

    `old_prints`, `new_prints`: fingerprints of files by the setting that names them. If both sides
    have one, it is compared instead of the path, so that a file may move but not change.
    """
    before, after = _flatten(old), _flatten(new)
    found = []
    for key in sorted(before.keys() | after.keys() | (old_prints.keys() & new_prints.keys())):
        values = [before.get(key, MISSING), after.get(key, MISSING)]
        if key in old_prints and key in new_prints:
            if old_prints[key] == new_prints[key]:
                continue
            values = [
                f"{value} (fingerprint {prints[key][:12]})".removeprefix(f"{MISSING} ")
                for value, prints in zip(values, (old_prints, new_prints), strict=True)
            ]
        elif values[0] == values[1] or all(value in (MISSING, None) for value in values):
            continue  # absent is equivalent to null
        found.append(Difference(key, values[0], values[1], change_of(key)))
    return found


def forbidden_changes(differences: Sequence[Difference]) -> list[str]:
    """A message with both values for every fixed setting that differs."""
    return [str(each) for each in differences if each.change == "fixed"]


def samples_per_step(config: Mapping[str, Any], *, data_size: int) -> int | None:
    """The global batch size of a resolved configuration; None if it is not given."""
    training = config.get("training", {})
    sizes = (training.get("batch_size"), training.get("gradient_accumulation_steps"))
    if not all(isinstance(size, int) for size in sizes):
        return None
    return math.prod(sizes) * data_size


def batch_settings(config: Mapping[str, Any]) -> list[Any]:
    """Batch settings of a resolved configuration, apart from the number of data ranks."""
    training = config.get("training", {})
    names = ("batch_size", "gradient_accumulation_steps", "batch_ramp")
    return [training.get(name) or None for name in names]


def keep_batch(config: Mapping[str, Any], samples: int, *, data_size: int) -> str | None:
    """Settings that keep `samples` per step on `data_size` data ranks, with micro-batches no larger
    than now; None if there are none."""
    own, rest = divmod(samples, data_size)
    if rest:
        return None
    largest = config["training"]["batch_size"]
    size = next(n for n in range(min(largest, own), 0, -1) if own % n == 0)
    accumulation = f"training.gradient_accumulation_steps={own // size}"
    return accumulation if size == largest else f"training.batch_size={size} {accumulation}"


def change_of(key: str) -> Change:
    """The rule of a dotted key; unknown keys are fixed."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for rule in (prefix, f"{prefix}.*"):
            if rule in RULES:
                return RULES[rule]
    return "fixed"


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(leaves(_by_name(config), into_lists=False))


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Key lists of sources by name, so that their order in the list does not matter."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(x, Mapping) for x in value):
            value = {
                str(each.get("name", number)): {k: v for k, v in each.items() if k != "name"}
                for number, each in enumerate(value)
            }
        named[key] = _by_name(value) if isinstance(value, Mapping) else value
    return named
