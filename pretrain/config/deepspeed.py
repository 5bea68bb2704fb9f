"""Reader of the DeepSpeed JSON: fills "auto", refuses contradictions and known pitfalls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.errors import cwd_hint
from pretrain.config.deepspeed_keys import ACCEPTED, REFUSED, STAGE_3_ONLY
from pretrain.config.errors import nearest, show
from pretrain.config.input_checks import leaves
from pretrain.config.schema import RunConfig
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS

FILES = CONFIGS / "ds"
AUTO = "auto"
_NEVER = 1_000_000_000
_PORTABLE = ("adamw", "fused_adam", "cpu_adam")


class DeepSpeedSettings(NamedTuple):
    """The resolved DeepSpeed settings of a run.

    `values`: the `config` of `deepspeed.initialize`. `clip_in_loop`: DeepSpeed wraps no optimizer
    (ZeRO-0 in fp32) and reports no norm, so the train step computes the norm and clips between the
    last backward and the optimizer step.
    """

    values: dict[str, Any]
    zero_stage: int
    clip_in_loop: bool


class _Owned(NamedTuple):
    """A value of the JSON that follows from the run configuration."""

    value: Any
    source: str


def resolve_ds_config(
    path: str | Path | None, config: RunConfig, *, data_size: int
) -> DeepSpeedSettings:
    """Read the JSON (that of `_default_file` when `path` is None) and complete it from `config`.

    A `path` that does not exist may name a file of the project's configs/ds: `zero1.json`, or
    `configs/ds/zero1.json` seen from any directory.

    Raises:
        ConfigError: the file cannot be read, has a key that is unknown or owned by the run
            configuration, contradicts it, or is known to train wrongly; or
            checkpoint.asynchronous is set for a run that only DeepSpeed can save.
    """
    file = _find(path) if path is not None else _default_file(config, data_size)
    flat = dict(leaves(_checked_section(_read(file), ACCEPTED, file), into_lists=False))
    stage = flat.get("zero_optimization.stage", 0)
    if stage == AUTO:
        raise ConfigError(f"{file}: zero_optimization.stage is 'auto'; write 0, 1, 2 or 3")
    clip_in_loop = stage == 0 and config.training.precision == "fp32"
    _check_stage(stage, config, file)
    _check_stage_keys(stage, flat, file)
    _check_experts(stage, flat, config, file)
    _check_precision(flat, config, file)
    _check_pipeline(flat, config, file)
    _check_optimizer(stage, flat, config, file)
    values = _merge(flat, _owned(config, data_size), file)
    if clip_in_loop:
        values["gradient_clipping"] = 0.0
    ds_config = DeepSpeedSettings(values, stage, clip_in_loop)
    _check_saving(config, ds_config)
    return ds_config


def layout_bound_by(config: RunConfig, ds_config: DeepSpeedSettings) -> str | None:
    """The setting that confines optimizer state to DeepSpeed's own files; None without one.

    Such a run resumes only at the layout that wrote its checkpoints, others at any layout.
    """
    training, zero = config.training, ds_config.values.get("zero_optimization", {})
    bound = {
        # muon keeps momentum of whole matrices; the others count steps per parameter group.
        f"training.optimizer={training.optimizer}": training.optimizer not in _PORTABLE,
        # The history of largest entries is part of Transformer Engine's layers, not of weights.
        "training.fp8_recipe=delayed": training.fp8_recipe == "delayed",
        # DeepSpeed 0.19.8 maps elements to parameters in their order before the round robin.
        "round_robin_gradients": zero.get("round_robin_gradients", False),
    }
    return next((name for name, applies in bound.items() if applies), None)


def _check_saving(config: RunConfig, ds_config: DeepSpeedSettings) -> None:
    bound = layout_bound_by(config, ds_config)
    if config.checkpoint.asynchronous and bound is not None:
        raise ConfigError(
            f"checkpoint.asynchronous=true with {bound}: only DeepSpeed can write that state, and "
            "it does so within the step; set checkpoint.asynchronous=false"
        )


def _find(path: str | Path) -> Path:
    given = Path(path)
    named = FILES / given.name
    is_name = given.as_posix() in (named.name, named.relative_to(CONFIGS.parent).as_posix())
    return named if is_name and not given.exists() and named.is_file() else given


def _default_file(config: RunConfig, data_size: int) -> Path:
    """ZeRO-1, or ZeRO-0 where ZeRO-1 would shard nothing and is not needed otherwise.

    With one data rank ZeRO-1 only copies gradients and weights once more. bf16 needs it for its
    fp32 accumulation, a pipeline for its gradient norm. Muon in fp32 cannot run on it.
    """
    of_no_use = data_size == 1 or config.training.optimizer == "muon"
    is_possible = config.parallel.pipeline == 1 and config.training.precision == "fp32"
    stage = 0 if of_no_use and is_possible else 1
    return FILES / f"zero{stage}.json"


def _owned(config: RunConfig, data_size: int) -> dict[str, _Owned]:
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps * data_size
    return {
        "train_batch_size": _Owned(
            batch, "training.batch_size x gradient_accumulation_steps x data size"
        ),
        "train_micro_batch_size_per_gpu": _Owned(training.batch_size, "training.batch_size"),
        "gradient_accumulation_steps": _Owned(
            training.gradient_accumulation_steps, "training.gradient_accumulation_steps"
        ),
        "gradient_clipping": _Owned(training.grad_clip, "training.grad_clip"),
        "bf16.enabled": _Owned(training.precision != "fp32", "training.precision"),
        # Without it ZeRO-2 would apply a non-finite step (0.19.8).
        "bf16.check_grad_overflow": _Owned(
            training.precision != "fp32", "training.precision; such a step is skipped"
        ),
        # Accumulating many micro-batches in bf16 loses small gradients.
        "data_types.grad_accum_dtype": _Owned("fp32", "fp32 accumulation of gradients"),
        # DeepSpeed regards every optimizer it did not build itself as untested.
        "zero_allow_untested_optimizer": _Owned(True, "training.optimizer"),
        "zero_force_ds_cpu_optimizer": _Owned(False, "training.optimizer"),
        # Both are on by default, and would split activations that differ between tensor ranks.
        "pipeline.pipe_partitioned": _Owned(False, "the layout of pipeline messages"),
        "pipeline.grad_partitioned": _Owned(False, "the layout of pipeline messages"),
    }


# Defaults that replace harmful ones of DeepSpeed: it prints during steps, its throughput timer
# synchronises with the device in every micro-batch, and in bf16 it would reduce the fp32 gradients
# of data ranks in bf16, and keep bf16 gradients beside their fp32 sums from one micro-batch to the
# next.
_DEFAULTS: dict[str, Any] = {
    "steps_per_print": _NEVER,
    "timers.throughput.enabled": False,
    "communication_data_type": "fp32",
    "bf16.immediate_grad_update": True,
}


def _merge(flat: Mapping[str, Any], owned: Mapping[str, _Owned], file: Path) -> dict[str, Any]:
    for key, value in flat.items():
        if key in owned:
            _check_agreement(key, value, owned[key], file)
        elif value == AUTO:
            raise ConfigError(f"{file}: {key} is 'auto', but nothing fills it; write a value")
    values = {key: each.value for key, each in owned.items()}
    return _nest({**_DEFAULTS, **flat, **values})


def _check_agreement(key: str, value: Any, owned: _Owned, file: Path) -> None:
    if value == AUTO or value == owned.value:
        return
    raise ConfigError(
        f"{file}: {key}={show(value)} contradicts {owned.source}, which gives "
        f'{show(owned.value)}; write "auto" in the JSON or change the run configuration'
    )


def _check_stage(stage: int, config: RunConfig, file: Path) -> None:
    name, pipeline = "zero_optimization.stage", config.parallel.pipeline
    if pipeline > 1 and stage != 1:
        why = (
            "without ZeRO the clipping norm covers only the first stage"
            if stage == 0
            else "DeepSpeed's pipeline engine cannot partition gradients or parameters"
        )
        raise ConfigError(
            f"{file}: {name}={stage} with parallel.pipeline={pipeline}: {why}; "
            "use configs/ds/zero1.json or parallel.pipeline=1"
        )
    precision = config.training.precision
    if stage == 0 and precision != "fp32":
        raise ConfigError(
            f"{file}: {name}=0 with training.precision={precision}: DeepSpeed accumulates "
            "gradients in fp32 only under ZeRO; use configs/ds/zero1.json or "
            "training.precision=fp32"
        )


def _check_stage_keys(stage: int, flat: Mapping[str, Any], file: Path) -> None:
    for key in flat:
        section, _, name = key.partition(".")
        top = name.partition(".")[0]
        if section == "zero_optimization" and stage != 3 and _is_stage_3_only(top):
            raise ConfigError(
                f"{file}: {key} has no effect with zero_optimization.stage={stage}; "
                "remove it or set stage to 3"
            )
        if section == "zero_optimization" and stage == 0 and top != "stage":
            raise ConfigError(
                f"{file}: {key} has no effect with zero_optimization.stage=0; "
                "remove it or set stage to 1, 2 or 3"
            )


def _check_experts(stage: int, flat: Mapping[str, Any], config: RunConfig, file: Path) -> None:
    size = config.parallel.expert
    if size == 1:
        return
    if stage not in (1, 2):
        why = (
            "the gradient norm and the saved state would miss the experts of other ranks"
            if stage == 0
            else "DeepSpeed would partition the experts of one rank over ranks that have others"
        )
        raise ConfigError(
            f"{file}: zero_optimization.stage={stage} with parallel.expert={size}: {why}; "
            "use configs/ds/zero1.json or zero2.json, or parallel.expert=1"
        )
    needed = {
        "reduce_scatter": "DeepSpeed reduces the gradients of experts only with it",
        "contiguous_gradients": "DeepSpeed reduces the gradients of experts only with it",
    }
    for name, why in needed.items():
        if flat.get(f"zero_optimization.{name}", True) is False:
            raise ConfigError(
                f"{file}: zero_optimization.{name}=false with parallel.expert={size}: {why}; "
                "remove the key"
            )


def _check_precision(flat: Mapping[str, Any], config: RunConfig, file: Path) -> None:
    dtype, precision = flat.get("communication_data_type"), config.training.precision
    if dtype == "bf16" and precision == "fp32":
        raise ConfigError(
            f"{file}: communication_data_type='bf16' with training.precision=fp32: gradients would "
            "be rounded between data ranks; remove the key or use training.precision=bf16"
        )


def _check_pipeline(flat: Mapping[str, Any], config: RunConfig, file: Path) -> None:
    pipeline = config.parallel.pipeline
    for key in (
        "wall_clock_breakdown",
        "flops_profiler.enabled",
    ):  # the profiler enables the former
        if pipeline > 1 and flat.get(key):
            raise ConfigError(
                f"{file}: {key}=true with parallel.pipeline={pipeline}: DeepSpeed's pipeline "
                "engine starts one of its timers twice and fails; remove the key"
            )


def _is_stage_3_only(name: str) -> bool:
    return name in STAGE_3_ONLY or name.startswith("stage3_")


def _check_optimizer(stage: int, flat: Mapping[str, Any], config: RunConfig, file: Path) -> None:
    training = config.training
    device = flat.get("zero_optimization.offload_optimizer.device", "none")
    if device != "none" and training.optimizer not in ("adamw", "cpu_adam"):
        raise ConfigError(
            f"{file}: zero_optimization.offload_optimizer.device={device!r} with "
            f"training.optimizer={training.optimizer}, which runs where the parameters are; "
            "use training.optimizer=cpu_adam or adamw, or remove offload_optimizer"
        )
    if training.optimizer == "muon":
        _check_muon(stage, config, file)


def _check_muon(stage: int, config: RunConfig, file: Path) -> None:
    """Allow Muon only where the gradient itself is clipped, before it is orthogonalised.

    BF16_Optimizer (bf16, ZeRO-1) and the loop (fp32, ZeRO-0) do so. DeepSpeed's other optimizers
    clip the orthogonalised update; at stage 2 in bf16 they also lose gradients of AdamW's
    parameters that lie before a matrix in a bucket (0.19.8), and at stage 3 a rank has no matrix.
    """
    precision = config.training.precision
    if stage == (0 if precision == "fp32" else 1):
        return
    remedy = "configs/ds/zero1.json with training.precision=bf16"
    if config.parallel.pipeline == 1:
        remedy += ", configs/ds/zero0.json with fp32,"
    raise ConfigError(
        f"{file}: zero_optimization.stage={stage} with training.optimizer=muon and "
        f"training.precision={precision}: DeepSpeed would clip and report the norm of the "
        f"orthogonalised update, not of the gradient; use {remedy} or training.optimizer=adamw"
    )


def _checked_section(
    values: Mapping[str, Any], schema: Mapping[str, Any], file: Path, prefix: str = ""
) -> dict[str, Any]:
    """Check every key and the type of every value in a section of the file."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in REFUSED:
            raise ConfigError(f"{file}: {key} must not be set here: {REFUSED[key]}; remove the key")
        if name not in schema:
            raise ConfigError(_unknown(key, name, schema, file, prefix))
        kind = schema[name]
        if not isinstance(kind, dict):
            checked[name] = value if value == AUTO else _checked(value, kind, key, file)
        elif isinstance(value, dict):
            checked[name] = _checked_section(value, kind, file, f"{key}.")
        else:
            raise ConfigError(f"{file}: {key}={show(value)} must be an object {{...}}")
    return checked


def _checked(value: Any, kind: Any, key: str, file: Path) -> Any:
    """Check `value` against `kind`, a type or a tuple of choices."""
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # DeepSpeed's own examples write bucket sizes as 5e8
    if isinstance(kind, tuple):
        choice = next((c for c in kind if c == value and type(c) is type(value)), None)
        if choice is None:
            allowed = ", ".join(show(each) for each in kind)
            raise ConfigError(f"{file}: {key}={show(value)} must be one of {allowed}; change it")
        return choice
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted or (kind in (int, float) and value < 0):
        what = {int: "a whole number >= 0", float: "a number >= 0", bool: "true or false"}
        wanted = what.get(kind, {str: "a string", list: "a list"}.get(kind))
        raise ConfigError(f"{file}: {key}={show(value)} must be {wanted}; change it")
    return value


def _unknown(key: str, name: str, schema: Mapping[str, Any], file: Path, prefix: str) -> str:
    guess = nearest(name, schema)
    if guess is not None:
        remedy = f"did you mean {prefix}{guess}?"
    else:
        remedy = f"valid keys {f'of {prefix[:-1]} ' if prefix else ''}are {', '.join(schema)}"
    return f"{file}: unknown key {key}; {remedy}"


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(each.name for each in FILES.glob("*.json")))
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(
            f"cannot read the DeepSpeed file {str(file)!r} (--ds_config){cwd_hint(file)}: "
            f"{reason}; {FILES} has {known}"
        ) from error
    try:
        values = json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not usable JSON: {error}; correct the file") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: {show(values)} must be an object {{...}}")
    return values


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(
                f"key {key!r} occurs twice, with {show(values[key])} and {show(value)}"
            )
        values[key] = value
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return nested
