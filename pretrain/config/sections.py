"""How a run is saved, watched, evaluated and reported: sections of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class CheckpointConfig(BaseModel):
    """When checkpoints are written and how many stay."""

    model_config = STRICT

    interval: int = Field(default=1000, gt=0, description="Steps between two checkpoints")
    keep: int = Field(default=3, gt=0, description="Newest checkpoints that stay on disk")
    keep_every: int | None = Field(
        default=None, gt=0, description="Those of steps that are multiples of it stay, too"
    )
    asynchronous: bool = Field(
        default=False,
        description="Write while the next steps train: a save stalls them for a copy to host "
        "memory, which then stays in use",
    )

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.interval:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} is not a multiple of "
                f"checkpoint.interval={self.interval}, so it would keep few or none; change one"
            )
        return self


class WatchdogConfig(BaseModel):
    """What ends a run that stands still, or whose ranks have come to train different models."""

    model_config = STRICT

    timeout: float | None = Field(
        default=600.0,
        gt=0,
        description="Seconds in which all ranks must meet, and each finish a part of the start, a "
        "step, an evaluation or a save, the first step and its compilation included; null: wait "
        "for ever",
    )
    slow_ratio: float | None = Field(
        default=2.0,
        gt=1,
        description="Warn of a rank whose own work in a step takes so many times as long as that "
        "of most ranks of its pipeline stage; null: never",
    )
    replica_interval: int | None = Field(
        default=100,
        gt=0,
        description="Steps after which ranks compare what they hold in common; null: never",
    )


class SpikeConfig(BaseModel):
    """Return to the checkpoint before a loss that stands out, and leave out the data around it."""

    model_config = STRICT

    sigma: float = Field(
        gt=0, description="Standard deviations above the mean at which a loss stands out"
    )
    window: int = Field(default=100, ge=2, description="Steps that mean and deviation are of")
    skip_before: int = Field(
        default=10, ge=0, description="Steps before the loss whose data are left out with its own"
    )
    max_rollbacks: int = Field(default=3, gt=0, description="Returns after which the run ends")


class StabilityConfig(BaseModel):
    """What happens when training goes wrong in its numbers."""

    model_config = STRICT

    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        description="Steps in a row that may be left out because loss or gradient is not finite",
    )
    skip_steps: Annotated[
        tuple[tuple[int, int], ...], BeforeValidator(lambda value: _ranges(value))
    ] = Field(default=(), description="[[first, last], ...]: steps whose data are left out")
    spike: SpikeConfig | None = Field(
        default=None, description="What to do about a loss that stands out; null: nothing"
    )

    @model_validator(mode="after")
    def _check(self) -> StabilityConfig:
        for first, last in self.skip_steps:
            if not 1 <= first <= last:
                raise ValueError(
                    f"stability.skip_steps has [{first}, {last}]; write [first, last] with "
                    "1 <= first <= last, such as [[120, 124]]"
                )
        return self


class EvaluationConfig(BaseModel):
    """When held-out text is scored and how much of it."""

    model_config = STRICT

    interval: int = Field(default=1000, gt=0, description="Steps between two evaluations")
    max_windows: int | None = Field(
        default=None, gt=0, description="Windows of data.validation to score; null: all"
    )


class WandbConfig(BaseModel):
    """Weights & Biases; its key comes from the environment, never from here."""

    model_config = STRICT

    mode: Literal["disabled", "offline", "online"] = Field(
        default="disabled", description="offline: write to the run directory, upload later"
    )
    project: str | None = Field(default=None, min_length=1, description="Project of the runs")
    name: str | None = Field(
        default=None, min_length=1, description="Name of this run; null: chosen by W&B"
    )

    @model_validator(mode="after")
    def _check(self) -> WandbConfig:
        if self.mode == "disabled":
            for key in ("project", "name"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"logging.wandb.{key}={getattr(self, key)!r} has no effect with "
                        "logging.wandb.mode=disabled; remove it or set mode to offline or online"
                    )
        elif self.project is None:
            raise ValueError(
                f"logging.wandb.mode={self.mode} needs a project; set logging.wandb.project=NAME"
            )
        return self


class LoggingConfig(BaseModel):
    """Writers beside metrics.jsonl, which is always written."""

    model_config = STRICT

    tensorboard: bool = Field(default=False, description="Write events to RUN_DIR/tensorboard")
    wandb: WandbConfig = Field(default_factory=WandbConfig)


def _ranges(value: Any) -> Any:
    """YAML has lists where pydantic's strict mode wants tuples."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(each) if isinstance(each, list) else each for each in value)
