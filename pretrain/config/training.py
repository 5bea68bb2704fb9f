"""Configuration section for the length, batch, optimizer and numerics of training."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from pretrain.config.sections import STRICT


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
    logits_parts: int = Field(
        default=1,
        ge=1,
        description="Parts of the sequence in which the losses compute the logits, again in "
        "backward, so that one part exists at a time; divides the sequence",
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


def _whole(value: Any) -> Any:
    """Accept token counts such as 10e9, which YAML reads as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pair(value: Any) -> Any:
    """Convert YAML's list to a pair."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be two numbers such as [0.9, 0.95]")
    return tuple(value)


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
