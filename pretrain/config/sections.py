"""Configuration sections for checkpoints, supervision, stability, evaluation and logging."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

TaskNames = Annotated[tuple[str, ...], BeforeValidator(lambda value: _names(value))]
StepRanges = Annotated[tuple[tuple[int, int], ...], BeforeValidator(lambda value: _ranges(value))]


class CheckpointConfig(BaseModel):
    """Interval and retention of checkpoints."""

    model_config = STRICT

    interval: int = Field(default=1000, gt=0, description="Steps between two checkpoints")
    interval_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Also save once so many minutes have passed since the last save",
    )
    keep: int = Field(
        default=3,
        gt=0,
        description="Number of newest checkpoints to keep; with stability.spike up to two older "
        "ones are kept besides, which a rollback needs",
    )
    keep_every: int | None = Field(
        default=None, gt=0, description="Also keep checkpoints of steps that are multiples of it"
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
    """Detection of hung runs, stragglers and diverged ranks."""

    model_config = STRICT

    timeout: float | None = Field(
        default=600.0,
        gt=0,
        description="Seconds for the rendezvous, and for each part of the start, step, evaluation "
        "and save, including the first step and its compilation; null: wait for ever",
    )
    slow_ratio: float | None = Field(
        default=2.0,
        gt=1,
        description="Warn about a rank whose own work per step exceeds the median of its pipeline "
        "stage by this factor; null: never",
    )
    replica_interval: int | None = Field(
        default=100,
        gt=0,
        description="Steps between comparisons of replicated tensors; null: never",
    )


class SpikeConfig(BaseModel):
    """Roll back to a checkpoint before a loss spike, and skip the data around it.

    The run returns to the newest checkpoint without any of the skipped data: at or before `spike -
    skip_before - 1`. Later checkpoints are deleted. If there is none that early, it returns to the
    oldest one, and the log says how many of the steps stay in.
    """

    model_config = STRICT

    sigma: float = Field(
        gt=0, description="Standard deviations above the mean that make a loss a spike"
    )
    window: int = Field(
        default=100, ge=2, description="Steps over which mean and deviation are taken"
    )
    skip_before: int = Field(
        default=10,
        ge=0,
        description="Steps before the spike whose data are also skipped; the run returns to a "
        "checkpoint before them",
    )
    max_rollbacks: int = Field(default=3, gt=0, description="Rollbacks after which the run ends")


class StabilityConfig(BaseModel):
    """Reaction to non-finite steps and loss spikes."""

    model_config = STRICT

    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        description="Consecutive steps that may be skipped because loss or gradient is not finite",
    )
    skip_steps: StepRanges = Field(
        default=(), description="[[first, last], ...]: steps whose data are skipped"
    )
    spike: SpikeConfig | None = Field(
        default=None, description="Reaction to a loss spike; null: none"
    )

    @model_validator(mode="after")
    def _check(self) -> StabilityConfig:
        _check_ranges("stability.skip_steps", self.skip_steps)
        return self


class EvaluationConfig(BaseModel):
    """Evaluation on held-out text, and on tasks of lm_eval (the extra `eval`)."""

    model_config = STRICT

    interval: int = Field(default=1000, gt=0, description="Steps between two evaluations")
    max_windows: int | None = Field(
        default=None, gt=0, description="Windows of data.validation to score; null: all"
    )
    tasks: TaskNames = Field(
        default=(), description="Tasks of lm_eval, or patterns; none that generates text"
    )
    task_interval: int | None = Field(
        default=None, gt=0, description="Steps between two evaluations of tasks; null: interval"
    )
    task_limit: float | None = Field(
        default=None, gt=0, description="Questions of each task, or below 1 a share; null: all"
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples before a question; null: as each task says"
    )
    include_path: str | None = Field(
        default=None, min_length=1, description="Folder with task files of your own"
    )

    @property
    def interval_of_tasks(self) -> int:
        return self.interval if self.task_interval is None else self.task_interval

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if any(not name for name in self.tasks):
            raise ValueError(
                f"evaluation.tasks={list(self.tasks)} has an empty name; write names of tasks, "
                "such as [arc_easy, lambada_openai]"
            )
        limit = self.task_limit
        if limit is not None and limit > 1 and limit % 1:
            raise ValueError(
                f"evaluation.task_limit={limit} must be a number of questions, or a share below 1; "
                "round it"
            )
        if not self.tasks:
            for key in ("task_interval", "task_limit", "num_fewshot", "include_path"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"evaluation.{key}={getattr(self, key)!r} has no effect without tasks; "
                        "set evaluation.tasks=[NAME] or remove it"
                    )
        return self


class WandbConfig(BaseModel):
    """Weights & Biases; its key comes from the environment only."""

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
    profile_steps: StepRanges = Field(
        default=(),
        description="[[first, last], ...]: steps that torch's profiler records, each range in a "
        "folder of RUN_DIR/profile",
    )
    memory_snapshot: bool = Field(
        default=False, description="Record the CUDA memory of the profiled steps, too"
    )

    @model_validator(mode="after")
    def _check(self) -> LoggingConfig:
        _check_ranges("logging.profile_steps", self.profile_steps)
        for (_, last), (first, end) in itertools.pairwise(self.profile_steps):
            if first <= last:
                raise ValueError(
                    f"logging.profile_steps has [{first}, {end}] after a range that ends at "
                    f"{last}; sort the ranges, and join those that overlap"
                )
        if self.memory_snapshot and not self.profile_steps:
            raise ValueError(
                "logging.memory_snapshot=true has no effect without steps to record; set "
                "logging.profile_steps=[[first,last]] or remove it"
            )
        return self


def _check_ranges(name: str, ranges: Sequence[tuple[int, int]]) -> None:
    for first, last in ranges:
        if not 1 <= first <= last:
            raise ValueError(
                f"{name} has [{first}, {last}]; write [first, last] with 1 <= first <= last, such "
                "as [[120, 124]]"
            )


def _ranges(value: Any) -> Any:
    """Convert YAML's lists to tuples, which pydantic's strict mode requires."""
    if not isinstance(value, list | tuple) or not all(map(_is_range, value)):
        raise ValueError("must be ranges of steps; write [[first, last]], such as [[120, 124]]")
    return tuple(tuple(each) for each in value)


def _is_range(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and all(type(each) is int for each in value)


def _names(value: Any) -> Any:
    """Convert YAML's list, or names separated by commas, as the command line has them."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    return tuple(value) if isinstance(value, list) else value
