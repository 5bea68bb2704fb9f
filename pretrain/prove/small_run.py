"""A run file made small enough to be proven here, with every feature of it on; or, with `whole`,
as it is but for its length and its data. No torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
_NOT_HERE = {
    "fused_adam": "the kernel of DeepSpeed's fused Adam",
    "cpu_adam": "the kernel of DeepSpeed's Adam on the host",
    "te_adam": "the kernel of Transformer Engine's Adam",
    "apex_adam": "the kernel of apex's Adam",
    "muon": "Muon's update, whose state is in files that only DeepSpeed reads",
}
# Sections of the JSON that repeat the run file, which has changed; agreement was checked before.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "data_types",
)


class SmallRun(NamedTuple):
    """The run that is proven: its configuration, DeepSpeed file and number of ranks.

    `changes`: every setting that differs from the run file. `unproven`: what this machine cannot
    show. `max_ranks`: the most that any leg starts. `resume_batch`: by how much
    the batch grows where the run goes on elsewhere.
    """

    config: RunConfig
    ds_config_values: dict[str, Any]
    ranks: int
    changes: list[Change]
    unproven: list[str]
    max_ranks: int
    resume_batch: int = 1

    @property
    def data_size(self) -> int:
        return self.ranks // (self.config.parallel.tensor * self.config.parallel.pipeline)


def shrink(
    config: RunConfig,
    ds_config_path: str | None,
    *,
    max_ranks: int,
    resume_batch: int = 1,
    whole: bool = False,
) -> SmallRun:
    """Shrink a run file, or with `whole` only what it is trained on: a few steps and other data.

    Raises:
        ConfigError: the run file cannot be used at any number of ranks, or its model does not fit
            a layout of `max_ranks`.
    """
    _check_as_given(config, ds_config_path)
    before = resolved(config)
    values = json.loads(json.dumps(before))
    unproven = _leave_out(values)
    if not whole:
        _shrink_layout(values, max_ranks)
    _check_ranks(values["parallel"], max_ranks)
    ranks = _num_ranks(values["parallel"], max_ranks)
    unproven += _smaller_axes(before["parallel"], values["parallel"], ranks)
    if not whole:
        values = _shrink_sizes(values, ranks)
        _shrink_batch(values["training"])
    _shorten(values, ranks // (values["parallel"]["tensor"] * values["parallel"]["pipeline"]))
    _shrink_data(values)
    small = parse_config(values)
    ds_config_values = _without_owned(ds_config_values_of(config, ds_config_path))
    if not whole:
        ds_config_values = _shrink_ds(ds_config_values)
    changes = differences(before, resolved(small))
    resolve_text(small, ds_config_values, ranks)
    return SmallRun(small, ds_config_values, ranks, changes, unproven, max_ranks, resume_batch)


def resolve_text(config: RunConfig, ds_config_values: Mapping[str, Any], ranks: int) -> None:
    """Check a run with a DeepSpeed JSON of these values.

    Raises:
        ConfigError: the config layer refuses it.
    """
    with _ds_file(json.dumps(ds_config_values)) as path:
        resolve_run(config, path, world_size=ranks)


def ds_config_values_of(config: RunConfig, given: str | None) -> dict[str, Any]:
    """DeepSpeed's JSON of a run, from a file or from its text, or that which the run takes by
    default."""
    data_size = _fewest_ranks(config) // (config.parallel.tensor * config.parallel.pipeline)
    with _ds_file(given) as path:
        ds_config = resolve_ds_config(path, config, data_size=data_size)
        if path is None:
            return {"zero_optimization": {"stage": ds_config.zero_stage}}
        file = Path(path) if Path(path).exists() else FILES / Path(path).name
        values: dict[str, Any] = json.loads(file.read_text())
        return values


@contextmanager
def _ds_file(given: str | None) -> Iterator[str | None]:
    """The path of DeepSpeed's JSON, which may be given as its text."""
    if given is None or not given.lstrip().startswith("{"):
        yield given
        return
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(given)
        file.flush()
        yield file.name


def _fewest_ranks(config: RunConfig) -> int:
    """The fewest ranks that the layout of a run file can have, with two data ranks or more."""
    parallel = config.parallel
    return parallel.tensor * parallel.pipeline * max(2, parallel.expert)


def _check_as_given(config: RunConfig, ds_config_path: str | None) -> None:
    with _ds_file(ds_config_path) as path:
        resolve_run(config, path, world_size=_fewest_ranks(config))


def _leave_out(values: dict[str, Any]) -> list[str]:
    """Replace what this machine lacks; returns what is therefore not proven."""
    training, unproven = values["training"], ["NCCL: ranks meet over gloo"]
    if training["precision"] == "fp8":
        training |= {"precision": "bf16", "fp8_recipe": None}
        training.pop("fp8_backend")
        unproven.append("FP8 kernels: the linear layers run in bf16")
    if training["optimizer"] in _NOT_HERE:
        unproven.append(f"{_NOT_HERE[training['optimizer']]}: torch's AdamW takes its place")
        training["optimizer"] = "adamw"
    if training["compile"]:
        training["compile"] = False
        unproven.append("torch.compile: layers run as written")
    if training["init_from"] is not None:
        training |= {"init_from": None, "init_from_changes": []}
        unproven.append("training.init_from: a smaller model starts from its seed")
    if values["data"]["fim"] is not None:
        values["data"]["fim"] = None
        unproven.append("data.fim: documents are read as they are")
    values["logging"] = {"tensorboard": False}
    return unproven


def _shrink_layout(values: dict[str, Any], max_ranks: int) -> None:
    parallel = values["parallel"]
    for axis in ("tensor", "expert"):
        parallel[axis] = min(parallel[axis], 2)
    # Stages that are neither first nor last, where there are ranks for them.
    stages = max_ranks // (parallel["tensor"] * parallel["expert"])
    parallel["pipeline"] = min(parallel["pipeline"], max(2, stages))


def _check_ranks(parallel: Mapping[str, int], max_ranks: int) -> None:
    needed = parallel["tensor"] * parallel["pipeline"] * parallel["expert"]
    if needed > max_ranks:
        raise ConfigError(
            f"--ranks {max_ranks}: tensor {parallel['tensor']} x pipeline {parallel['pipeline']} x "
            f"expert {parallel['expert']} needs {needed} ranks; raise --ranks"
        )


def _smaller_axes(before: Mapping[str, int], after: Mapping[str, int], ranks: int) -> Iterator[str]:
    """Combinations of ranks that the smaller layout does not have."""
    if before["pipeline"] > after["pipeline"] == 2:
        yield f"pipeline {before['pipeline']}: stages that are neither first nor last"
    for axis in ("tensor", "expert"):
        if before[axis] > 2:
            yield f"{axis} {before[axis]}: more than two ranks on this axis"
    cut = after["tensor"] * after["pipeline"]
    if ranks == cut:
        yield f"data parallelism beside the cuts: pass --ranks {2 * cut} for it"


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


def _shrink_batch(training: dict[str, Any]) -> None:
    for name in ("batch_size", "gradient_accumulation_steps"):
        training[name] = min(training[name], 2)
    training["lr"] = max(training["lr"], _VISIBLE_LR)


def _shorten(values: dict[str, Any], data_size: int) -> None:
    """A few steps, each saved and evaluated, with all levels of a ramp and of a schedule."""
    training = values["training"]
    levels = min(len(training["batch_ramp"]), 2)
    accumulation = max(training["gradient_accumulation_steps"], levels + 1 if levels else 1)
    training["gradient_accumulation_steps"] = accumulation
    training |= {"max_steps": STEPS, "max_tokens": None, "max_epochs": None}
    training["decay_steps"] = min(training["decay_steps"], 2)
    training["warmup_steps"] = min(
        training["warmup_steps"], STEPS - 1 - training["decay_steps"] - 1
    )
    if training["grad_clip"] > 0:
        training["grad_clip"] = min(training["grad_clip"], _CLIPPING)
    training["batch_ramp"] = _ramp(levels, values, data_size)
    values["checkpoint"] |= {"interval": 1, "keep": STEPS, "keep_every": None}
    # Tasks change nothing that is compared, and their texts fit no vocabulary of this size.
    has_text = values["data"]["validation"]
    values["evaluation"] = {"interval": 1, "max_windows": _WINDOWS} if has_text else {}
    # A spike stands out from many more steps.
    values["stability"] |= {"skip_steps": [[SKIPPED, SKIPPED]], "spike": None}
    if values["watchdog"]["replica_interval"] is not None:
        values["watchdog"]["replica_interval"] = 1


def _ramp(levels: int, values: Mapping[str, Any], data_size: int) -> list[dict[str, int]]:
    """Smaller batches at the beginning: the first for two steps, then one step each."""
    per_round = values["training"]["batch_size"] * data_size
    ramp, tokens = [], 0
    for level in range(1, levels + 1):
        steps = 2 if level == 1 else 1
        tokens += steps * level * per_round * values["data"]["sequence_length"]
        ramp.append({"until_tokens": tokens, "sequences_per_step": level * per_round})
    return ramp


def _shrink_data(values: dict[str, Any]) -> None:
    data = values["data"]
    data |= {"tokenizer": None, "eod": None, "cache_dir": None, "warn_epochs": 1000.0}
    for source in data["train"]:
        source["max_epochs"] = None
    stages = data["stages"]
    for number, stage in enumerate(stages[:-1], start=1):
        end = max(number, round(number * STEPS / len(stages)))
        stage |= {"until_step": end, "until_fraction": None}


def _without_owned(ds_config_values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ds_config_values.items() if name not in _OWNED}


def _shrink_ds(ds_config_values: Mapping[str, Any]) -> dict[str, Any]:
    """Buckets and thresholds, which count elements, so that there are several of each."""
    zero = dict(ds_config_values.get("zero_optimization", {}))
    if zero.get("stage", 0) > 0:
        zero = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000, **zero}
    if zero.get("stage") == 3:
        zero = {"stage3_param_persistence_threshold": 100, **zero}
    for name, value in zero.items():
        if name.endswith(("bucket_size", "_threshold", "max_live_parameters")) and (
            isinstance(value, int | float) and value > 2000
        ):
            zero[name] = 2000
    return {**ds_config_values, "zero_optimization": zero}
