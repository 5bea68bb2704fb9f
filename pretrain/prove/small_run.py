"""A run file made small enough to be proven here, with every feature of it on. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.registry import get_config_class
from pretrain.config.deepspeed import FILES, resolve_ds_config
from pretrain.config.layout import check_layout
from pretrain.config.resolve import resolve_run
from pretrain.config.schema import RunConfig, parse_config, resolved
from pretrain.errors import ConfigError
from pretrain.prove.sizes import Change, differences, halve, visible_weights

STEPS = 5  # of the run that is proven
SKIPPED = 1  # its data are skipped, so that a checkpoint holds the initial weights
_VISIBLE_LR = 0.01
_CLIPPING = 0.1
_WINDOWS = 5  # of held-out text: not a multiple of any batch here

# What is not proven on a CPU, and what the proof does instead.
_NOT_HERE: dict[str, Any] = {
    "fused_adam": "adamw",
    "cpu_adam": "adamw",
    "te_adam": "adamw",
    "apex_adam": "adamw",
}


class SmallRun(NamedTuple):
    """The run that is proven: its configuration, DeepSpeed file and number of ranks.

    `changes`: every setting that differs from the run file. `unproven`: what this machine cannot
    show.
    """

    config: RunConfig
    ds_values: dict[str, Any]
    ranks: int
    changes: list[Change]
    unproven: list[str]

    @property
    def data_size(self) -> int:
        return self.ranks // (self.config.parallel.tensor * self.config.parallel.pipeline)


def shrink(config: RunConfig, ds_config_path: str | None, *, max_ranks: int) -> SmallRun:
    """Shrink a run file.

    Raises:
        ConfigError: the run file cannot be used at any number of ranks, or its model does not fit
            a layout of `max_ranks`.
    """
    _check_as_given(config, ds_config_path)
    before = resolved(config)
    values = json.loads(json.dumps(before))
    unproven = _leave_out(values)
    _shrink_layout(values, max_ranks)
    ranks = _num_ranks(values["parallel"], max_ranks)
    values = _shrink_sizes(values, ranks)
    _shrink_training(values)
    _shrink_data(values)
    small = parse_config(values)
    ds_values = _shrink_ds(ds_values_of(config, ds_config_path), config, small)
    changes = differences(before, resolved(small))
    return SmallRun(small, ds_values, ranks, changes, unproven)


def ds_values_of(config: RunConfig, path: str | None) -> dict[str, Any]:
    """The content of the DeepSpeed file of a run, or of the one it takes by default."""
    data_size = _smallest_world(config) // (config.parallel.tensor * config.parallel.pipeline)
    ds_config = resolve_ds_config(path, config, data_size=data_size)
    if path is None:
        return {"zero_optimization": {"stage": ds_config.zero_stage}}
    file = Path(path) if Path(path).exists() else FILES / Path(path).name
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def _smallest_world(config: RunConfig) -> int:
    """The fewest ranks that the layout of a run file can have, with two data ranks or more."""
    parallel = config.parallel
    return parallel.tensor * parallel.pipeline * max(2, parallel.expert)


def _check_as_given(config: RunConfig, ds_config_path: str | None) -> None:
    resolve_run(config, ds_config_path, world_size=_smallest_world(config))


def _leave_out(values: dict[str, Any]) -> list[str]:
    """Replace what this machine lacks; returns what is therefore not proven."""
    training, unproven = values["training"], ["NCCL: ranks meet over gloo"]
    if training["precision"] == "fp8":
        training |= {"precision": "bf16", "fp8_recipe": None}
        unproven.append("FP8 kernels: the linear layers run in bf16")
    if training["optimizer"] in _NOT_HERE:
        unproven.append(f"the {training['optimizer']} kernel: torch's AdamW takes its place")
        training["optimizer"] = _NOT_HERE[training["optimizer"]]
    if training["compile"]:
        training["compile"] = False
        unproven.append("torch.compile: layers run as written")
    if training["init_from"] is not None:
        training |= {"init_from": None, "init_from_changes": []}
        unproven.append("training.init_from: a smaller model starts from its seed")
    values["logging"] = {"tensorboard": False}
    return unproven


def _shrink_layout(values: dict[str, Any], max_ranks: int) -> None:
    parallel = values["parallel"]
    for axis in ("tensor", "pipeline", "expert"):
        parallel[axis] = min(parallel[axis], 2)
    needed = parallel["tensor"] * parallel["pipeline"] * parallel["expert"]
    if needed > max_ranks:
        raise ConfigError(
            f"--ranks {max_ranks}: tensor {parallel['tensor']} x pipeline {parallel['pipeline']} x "
            f"expert {parallel['expert']} needs {needed} ranks; raise --ranks"
        )


def _num_ranks(parallel: Mapping[str, int], max_ranks: int) -> int:
    """Two data ranks where they fit, more for experts."""
    cut = parallel["tensor"] * parallel["pipeline"]
    data = max(parallel["expert"], min(2, max_ranks // cut))
    return cut * data


def _shrink_sizes(values: dict[str, Any], ranks: int) -> dict[str, Any]:
    family = get_config_class(values["model"]["family"])

    def accepts(changed: Mapping[str, Any]) -> bool:
        try:
            config = parse_config(_with_length(changed))
            check_layout(config, ranks)
        except ValueError:
            return False
        return True

    limits = {"model.vocab_size": 320} if values["data"]["kind"] == "bytes" else {}
    declared = getattr(family, "smallest_sizes", {})
    limits |= {f"model.{name}": size for name, size in declared.items()}
    small = halve(values, accepts, limits=limits)
    small["model"] |= visible_weights(small["model"])
    return small


def _with_length(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values whose plan of steps cannot fail, while sizes are tried."""
    training = dict(values["training"])
    training |= {"max_steps": 10_000_000, "max_tokens": None, "max_epochs": None, "batch_ramp": []}
    return {**values, "training": training}


def _shrink_training(values: dict[str, Any]) -> None:
    training = values["training"]
    levels = min(len(training["batch_ramp"]), 2)
    training["batch_size"] = min(training["batch_size"], 2)
    accumulation = min(training["gradient_accumulation_steps"], 2)
    training["gradient_accumulation_steps"] = max(accumulation, levels + 1 if levels else 1)
    training |= {"max_steps": STEPS, "max_tokens": None, "max_epochs": None, "log_interval": 1}
    training["decay_steps"] = min(training["decay_steps"], 1)
    training["warmup_steps"] = min(
        training["warmup_steps"], STEPS - 1 - training["decay_steps"] - 1
    )
    training["lr"] = max(training["lr"], _VISIBLE_LR)
    if training["grad_clip"] > 0:
        training["grad_clip"] = min(training["grad_clip"], _CLIPPING)
    training["batch_ramp"] = []
    values["checkpoint"] |= {"interval": 1, "keep": STEPS, "keep_every": None}
    if values["data"]["validation"]:
        values["evaluation"] = {"interval": 1, "max_windows": _WINDOWS}
    values["stability"]["skip_steps"] = [[SKIPPED, SKIPPED]]
    if values["watchdog"]["replica_interval"] is not None:
        values["watchdog"]["replica_interval"] = 1


def _shrink_data(values: dict[str, Any]) -> None:
    data = values["data"]
    data |= {"tokenizer": None, "eod": None, "cache_dir": None, "warn_epochs": 1000.0}
    for source in data["train"]:
        source["max_epochs"] = None
    stages = data["stages"]
    for number, stage in enumerate(stages[:-1], start=1):
        end = max(number, round(number * STEPS / len(stages)))
        stage |= {"until_step": end, "until_fraction": None}


def _shrink_ds(ds_values: dict[str, Any], config: RunConfig, small: RunConfig) -> dict[str, Any]:
    """Buckets and thresholds, which count elements, so that there are several of each."""
    zero = dict(ds_values.get("zero_optimization", {}))
    for name, value in zero.items():
        if name.endswith(("bucket_size", "_threshold", "max_live_parameters")) and (
            isinstance(value, int | float) and value > 2000
        ):
            zero[name] = 2000
    return {**ds_values, "zero_optimization": zero}
