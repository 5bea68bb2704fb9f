"""The typed configuration of a run, the schema of its YAML file. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Protocol, cast

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from data_tools.config import DataConfig
from models.registry import family_names, get_config_class
from pretrain.config.compat.aliases import resolve_aliases
from pretrain.config.errors import config_error, show
from pretrain.config.input_checks import check_credentials, check_numbers
from pretrain.config.sections import (
    STRICT,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    StabilityConfig,
    WatchdogConfig,
)
from pretrain.errors import ConfigError


class ModelConfig(Protocol):
    """Interface of every family's model configuration."""

    @property
    def family(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...

    def tensor_divisible(self) -> dict[str, int]:
        """Sizes that parallel.tensor must divide, by their key below `model`."""
        ...

    def function(self) -> dict[str, Any]:
        """Settings that determine what the model computes in inference, given its weights;
        derived sizes are written out."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class BatchRampStep(BaseModel):
    """A batch size of the ramp, before the full batch."""

    model_config = STRICT

    until_tokens: Annotated[int, BeforeValidator(lambda value: _whole(value))] = Field(
        gt=0,
        description="The size applies up to the step in which the run reaches this many tokens",
    )
    sequences_per_step: int = Field(gt=0, description="Sequences of a step, over all data ranks")


class TrainingConfig(BaseModel):
    """Length, batch, optimizer and numerics of training."""

    model_config = STRICT

    max_steps: int | None = Field(default=None, gt=0, description="Stop after this many steps")
    max_tokens: Annotated[int | None, BeforeValidator(lambda value: _whole(value))] = Field(
        default=None, gt=0, description="Stop at the first step that has seen this many tokens"
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Passes over data.train after which training stops",
    )
    batch_size: int = Field(gt=0, description="Sequences per micro-batch and data rank")
    gradient_accumulation_steps: int = Field(
        default=1, gt=0, description="Micro-batches per optimizer step and data rank"
    )
    batch_ramp: Annotated[
        tuple[BatchRampStep, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = Field(
        default=(),
        description="Smaller batches at the beginning, with fewer micro-batches: ascending "
        "{until_tokens, sequences_per_step}; they count as steps for the learning rate",
    )

    lr: float = Field(gt=0, description="Peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="Learning rate after the warmup. wsd: constant, then a decay at the end",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warmup from 0 to lr")
    decay_steps: int = Field(default=0, ge=0, description="Steps of wsd's final decay")
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Final learning rate of cosine and wsd over lr"
    )
    lr_multipliers: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Part of a parameter name -> factor on lr; the longest match wins. A tied "
        "parameter goes by its name in the first layer that holds it",
    )

    optimizer: Literal["adamw", "fused_adam", "cpu_adam", "te_adam", "apex_adam", "muon"] = Field(
        default="adamw",
        description="AdamW of torch, of DeepSpeed for the device (fused) or for the host (cpu), of "
        "Transformer Engine, of NVIDIA apex; or Muon for the matrices of hidden layers, each "
        "expert's by itself, with AdamW for the rest",
    )
    betas: Annotated[tuple[float, float], BeforeValidator(lambda value: _pair(value))] = Field(
        default=(0.9, 0.95), description="Decay rates of AdamW's first and second moment"
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay; vectors do not decay"
    )
    grad_clip: float = Field(
        default=1.0, ge=0, description="Largest global 2-norm of the gradient; 0: no clipping"
    )

    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the z-loss, the squared log-partition of the head's logits "
        "averaged over scored tokens; PaLM's is 1e-4, 0: none",
    )

    precision: Literal["fp32", "bf16", "fp8"] = Field(
        default="bf16", description="bf16 and fp8 keep fp32 master weights and accumulate in fp32"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = Field(
        default=None, description="Scaling of FP8 tensors; with precision=fp8 only"
    )
    fp8_backend: Literal["transformer_engine", "torch", "emulated"] = Field(
        default="transformer_engine",
        description="torch: torch's own kernels, for tensorwise; emulated: the same numbers "
        "without kernels, slowly, on any device",
    )
    activation_recomputation: Literal["none", "full"] = Field(
        default="none",
        description="full: keep only the input of each layer and recompute its forward pass",
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint, run or converted model that provides the initial weights",
    )
    init_from_changes: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = Field(
        default=(),
        description="Settings of model, such as rope_theta, or data.tokenizer that deliberately "
        "differ from those of init_from",
    )
    compile: bool = Field(default=False, description="torch.compile the layers")
    seed: int = Field(default=1234, ge=0, description="Seed of weights, sample order and dropout")
    log_interval: int = Field(default=10, gt=0, description="Steps between two logged lines")

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        _check_length(self)
        _check_ramp(self)
        _check_schedule(self)
        _check_numerics(self)
        if self.init_from_changes and self.init_from is None:
            raise ValueError(
                f"training.init_from_changes={list(self.init_from_changes)} has no effect without "
                "training.init_from; set it or remove the changes"
            )
        return self


class ParallelConfig(BaseModel):
    """Ranks per axis. data = world size / (tensor x pipeline); expert divides data."""

    model_config = STRICT

    tensor: int = Field(default=1, gt=0, description="Ranks that share each matrix")
    pipeline: int = Field(default=1, gt=0, description="Stages that share the layers")
    context: int = Field(default=1, gt=0, description="Reserved; must be 1")
    expert: int = Field(default=1, gt=0, description="Data ranks that share the experts of a layer")
    sequence_parallel: bool = Field(
        default=False,
        description="Shard activations between the matrices over tensor ranks, along the sequence",
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.context != 1:
            raise ValueError(
                f"parallel.context={self.context}: this axis is reserved and not implemented; "
                "set parallel.context=1"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel=true has no effect with parallel.tensor=1; "
                "set parallel.tensor to 2 or more, or parallel.sequence_parallel=false"
            )
        return self


class RunConfig(BaseModel):
    """All settings of a run, apart from DeepSpeed's JSON."""

    model_config = STRICT

    run_dir: str = Field(
        min_length=1, description="Directory of config.yaml, metrics.jsonl and checkpoints/"
    )
    resume: Literal["auto", "must", "never"] = Field(
        default="auto",
        description="auto: continue from a valid checkpoint in run_dir, or start if there is none",
    )
    # The family named by `model.family` provides the schema of this section.
    model: Annotated[
        ModelConfig,
        PlainValidator(lambda value: _parse_model(value)),
        PlainSerializer(lambda model: model.model_dump(mode="json"), return_type=dict[str, Any]),
    ]
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    stability: StabilityConfig = Field(default_factory=StabilityConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        _check_stages(self)
        _check_rollbacks(self)
        if self.training.optimizer == "muon" and self.parallel.tensor > 1:
            raise ValueError(
                f"training.optimizer=muon with parallel.tensor={self.parallel.tensor}: Muon "
                "orthogonalises whole matrices and a tensor rank holds a part of each; "
                "set parallel.tensor=1 or training.optimizer=adamw"
            )
        if self.training.fp8_recipe == "delayed" and self.parallel.pipeline > 1:
            raise ValueError(
                f"training.fp8_recipe=delayed with parallel.pipeline={self.parallel.pipeline}: "
                "its largest entries are reduced over all ranks at every forward pass, for which "
                "stages would wait for each other for ever; use tensorwise"
            )
        if not self.data.validation and self.evaluation != EvaluationConfig():
            raise ValueError(
                "evaluation has no effect without held-out text; "
                "set data.validation or remove the evaluation section "
                "(~evaluation on the command line)"
            )
        return self


def parse_config(values: Mapping[str, Any], *, given: Collection[str] = frozenset()) -> RunConfig:
    """The typed configuration of a plain mapping, as a YAML file holds it; aliases are accepted.

    `given`: dotted keys set on the command line; they win over other spellings in `values`.

    Raises:
        ConfigError: an unknown, missing or unusable setting.
    """
    check_credentials(values)
    check_numbers(values)
    try:
        return RunConfig.model_validate(resolve_aliases(values, given=given))
    except ValidationError as error:
        raise config_error(error, RunConfig) from error


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every setting of the run, defaults included, as JSON types; `parse_config` reads it back."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """The text of RUN_DIR/config.yaml."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=False)


def _parse_model(value: Any) -> ModelConfig:
    if isinstance(value, BaseModel):
        return cast(ModelConfig, value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"model={show(value)} must be a section of settings; see configs/model")
    if "family" not in value:
        raise ConfigError(
            f"model.family is missing; set it to one of {', '.join(family_names())}, "
            "or choose a file of configs/model with model=FAMILY/SIZE"
        )
    schema = get_config_class(value["family"])
    try:
        return cast(ModelConfig, schema.model_validate(dict(value)))
    except ValidationError as error:
        raise config_error(error, schema, prefix="model.") from error


def _whole(value: Any) -> Any:
    """Accept token counts such as 10e9, which YAML reads as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pair(value: Any) -> Any:
    """Convert YAML's list to a pair."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be two numbers such as [0.9, 0.95]")
    return tuple(value)


def _check_rollbacks(config: RunConfig) -> None:
    """Refuse rollbacks that the run ends too early for; by time it may save after any step."""
    spike, steps = config.stability.spike, config.training.max_steps
    if spike is None or steps is None:
        return
    if spike.window >= steps:
        raise ValueError(
            f"stability.spike.window={spike.window} has no effect with training.max_steps={steps}: "
            "no loss is compared before the window is full; lower it or set stability.spike=null"
        )
    checkpoint = config.checkpoint
    if checkpoint.interval_minutes is None and checkpoint.interval + spike.skip_before >= steps:
        raise ValueError(
            f"stability.spike.skip_before={spike.skip_before} with checkpoint.interval="
            f"{checkpoint.interval} and training.max_steps={steps}: no checkpoint would be old "
            "enough to return to; lower one of the first two or set stability.spike=null"
        )


def _check_stages(config: RunConfig) -> None:
    for number, stage in enumerate(config.data.stages):
        changeable = _changeable(config.model)
        for name in stage.model:
            if name not in changeable:
                raise ValueError(
                    f"data.stages.{number}.model.{name}: the {config.model.family} family lets "
                    f"{', '.join(sorted(changeable)) or 'no setting'} change in a run; remove it"
                )
        _check_stage_values(config.model, stage.model, prefix=f"data.stages.{number}.model.")


def _check_stage_values(model: ModelConfig, changes: Mapping[str, Any], *, prefix: str) -> None:
    settings = cast(BaseModel, model)
    try:
        type(settings).model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        raise config_error(error, type(settings), prefix=prefix) from error


def _changeable(model: ModelConfig) -> frozenset[str]:
    """Settings that a stage may change, as declared by the family's configuration."""
    return getattr(model, "changeable_settings", frozenset())


def _check_length(training: TrainingConfig) -> None:
    if training.max_steps is None and training.max_tokens is None and training.max_epochs is None:
        raise ValueError(
            "training has no end; set training.max_steps, training.max_tokens or "
            "training.max_epochs"
        )
    ramps = training.warmup_steps + training.decay_steps
    if training.max_steps is not None and ramps >= training.max_steps:
        name = "training.warmup_steps"
        if training.decay_steps:
            name += " + training.decay_steps"
        raise ValueError(
            f"{name}={ramps} must be less than training.max_steps={training.max_steps}; "
            "shorten the ramps or train longer"
        )


def _check_ramp(training: TrainingConfig) -> None:
    for number, (before, step) in enumerate(itertools.pairwise(training.batch_ramp), start=1):
        for name in ("until_tokens", "sequences_per_step"):
            first, second = getattr(before, name), getattr(step, name)
            if second <= first:
                raise ValueError(
                    f"training.batch_ramp.{number}.{name}={second} is not more than {first}, that "
                    "of the step before it; a ramp ascends: order its steps or remove one"
                )


def _check_schedule(training: TrainingConfig) -> None:
    if (training.schedule == "wsd") != (training.decay_steps > 0):
        raise ValueError(
            f"training.decay_steps={training.decay_steps} with training.schedule="
            f"{training.schedule}: wsd needs decay_steps > 0 and the others have no use for it; "
            "change one of the two"
        )
    default = TrainingConfig.model_fields["min_lr_ratio"].default
    if training.schedule == "constant" and training.min_lr_ratio != default:
        raise ValueError(
            f"training.min_lr_ratio={training.min_lr_ratio} has no effect with "
            "training.schedule=constant; remove it or choose cosine or wsd"
        )


def _check_numerics(training: TrainingConfig) -> None:
    if (training.precision == "fp8") != (training.fp8_recipe is not None):
        raise ValueError(
            f"training.fp8_recipe={training.fp8_recipe} with training.precision="
            f"{training.precision}: fp8 needs a recipe (delayed, tensorwise, blockwise or mxfp8) "
            "and it has no effect otherwise; change one of the two"
        )
    if training.precision != "fp8" and training.fp8_backend != "transformer_engine":
        raise ValueError(
            f"training.fp8_backend={training.fp8_backend} has no effect with training.precision="
            f"{training.precision}; remove it or set training.precision=fp8"
        )
    if training.fp8_backend == "torch" and training.fp8_recipe != "tensorwise":
        raise ValueError(
            f"training.fp8_backend=torch with training.fp8_recipe={training.fp8_recipe}: torch's "
            "own kernels have tensorwise alone; use that, or another fp8_backend"
        )
    if training.fp8_recipe == "delayed" and training.fp8_backend == "emulated":
        raise ValueError(
            "training.fp8_recipe=delayed with training.fp8_backend=emulated: the emulation keeps "
            "no history of largest entries; use tensorwise, blockwise or mxfp8"
        )
    if training.fp8_recipe == "delayed" and training.activation_recomputation != "none":
        raise ValueError(
            "training.fp8_recipe=delayed with training.activation_recomputation="
            f"{training.activation_recomputation}: Transformer Engine would move its history of "
            "largest entries on once more for every recomputed layer; use tensorwise or none"
        )
    for beta in training.betas:
        if not 0 <= beta < 1:
            raise ValueError(
                f"training.betas={list(training.betas)} must be at least 0 and less than 1; "
                "the usual values are [0.9, 0.95]"
            )
