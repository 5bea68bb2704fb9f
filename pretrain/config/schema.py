"""The typed configuration of a run, the schema of its YAML file. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Protocol, cast

import yaml
from pydantic import (
    BaseModel,
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
from pretrain.config.training import TrainingConfig
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
        _check_evaluation(self)
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


def _check_evaluation(config: RunConfig) -> None:
    """Refuse settings of an evaluation that the run does not have."""
    data, evaluation = config.data, config.evaluation
    if not data.validation and not evaluation.tasks and evaluation != EvaluationConfig():
        raise ValueError(
            "evaluation has no effect without held-out text or tasks; set data.validation or "
            "evaluation.tasks, or remove the evaluation section (~evaluation on the command line)"
        )
    if not data.validation and evaluation.max_windows is not None:
        raise ValueError(
            f"evaluation.max_windows={evaluation.max_windows} has no effect without held-out text; "
            "set data.validation or remove it"
        )
    default = EvaluationConfig.model_fields["interval"].default
    if (
        not data.validation
        and evaluation.task_interval is not None
        and evaluation.interval != default
    ):
        raise ValueError(
            f"evaluation.interval={evaluation.interval} has no effect without held-out text beside "
            f"evaluation.task_interval={evaluation.task_interval}; remove one of them"
        )
    if evaluation.tasks and data.kind != "bytes" and data.tokenizer is None:
        raise ValueError(
            f"evaluation.tasks={list(evaluation.tasks)} with data.tokenizer=null: their texts are "
            "tokenized as the data were; set data.tokenizer"
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
