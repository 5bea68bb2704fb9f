"""What a run computes, and whether it can: model, objective, layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.loading.batch import IGNORED_LABEL
from models.base import ModelFamily, TokenInputs, logits_of
from models.registry import get_family
from parallel.carry import LayerSpec, SequentialModel, check_layers
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_parallel_z_losses
from parallel.precision import Precision
from pretrain.config import RunConfig
from pretrain.config.deepspeed import ResolvedDeepSpeed
from pretrain.engine.loss_targets import Targets
from pretrain.engine.optimizers import spoil
from pretrain.engine.parameter_groups import check_multipliers
from pretrain.errors import ConfigError

Z_LOSS = "z_loss"


class RunPlan(NamedTuple):
    """What every part of an engine needs to know of its run."""

    run: RunConfig
    resolved: ResolvedDeepSpeed
    family: ModelFamily
    ctx: ParallelContext

    @classmethod
    def of(cls, run: RunConfig, resolved: ResolvedDeepSpeed, ctx: ParallelContext) -> RunPlan:
        return cls(run, resolved, get_family(run.model.family), ctx)

    @property
    def segmented(self) -> bool:
        return self.run.data.reset_at_documents

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The terms that `objective` reports."""
        extra = (Z_LOSS,) if self.run.training.z_loss else ()
        return (*self.family.loss_names, *extra)

    def specs(self) -> list[LayerSpec]:
        return self.family.layer_specs(self.run.model, segmented=self.segmented)

    def schema(self, ctx: ParallelContext, *, seq_length: int) -> Any:
        return self.family.carry_schema(
            self.run.model,
            ctx,
            micro_batch_size=self.run.training.batch_size,
            seq_length=seq_length,
            segmented=self.segmented,
        )

    def objective(self, output: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What training minimises, and the terms it reports.

        `targets`: Targets, or the tuple of its fields that PipelineEngine makes of it.
        """
        labels, num_scored = Targets(*targets)
        total, terms = self.family.loss(
            output, labels, config=self.run.model, ctx=self.ctx, num_scored=num_scored
        )
        if self.run.training.z_loss:
            z_loss = self._z_loss(logits_of(output), labels, num_scored)
            total = total + self.run.training.z_loss * z_loss
            terms = terms | {Z_LOSS: z_loss.detach()}
        return spoil(total), terms

    def _z_loss(self, logits: Tensor, labels: Tensor, num_scored: Tensor | None) -> Tensor:
        """Mean of `(log Z)^2` over scored tokens, which are counted as those of lm_loss are."""
        if num_scored is None:
            num_scored = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return vocab_parallel_z_losses(logits, labels, ctx=self.ctx).sum() / num_scored

    def score(self, output: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What evaluation sums: the losses of the scored tokens, in nats."""
        losses = self.family.token_losses(output, targets[0], ctx=self.ctx)
        zero = torch.zeros((), device=losses.device)
        return losses.sum(), dict.fromkeys(self.loss_names, zero)


def build_precision(run: RunConfig) -> Precision:
    """The precision of the run.

    Raises:
        ConfigError: FP8 without what it needs on this machine.
    """
    try:
        return Precision(run.training.precision, run.training.fp8_recipe)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from error


def build_context(run: RunConfig, *, precision: Precision, device: torch.device) -> ParallelContext:
    """Lay the initialised process group out as the run says (collective)."""
    return ParallelContext.from_world(
        tensor=run.parallel.tensor,
        pipeline=run.parallel.pipeline,
        context=run.parallel.context,
        expert=run.parallel.expert,
        sequence_parallel=run.parallel.sequence_parallel,
        precision=precision,
        device=device,
    )


def check_model(plan: RunPlan) -> SequentialModel:
    """Run the layers on the meta device, so that wrong shapes and names cost no memory.

    Returns the whole model on that device.

    Raises:
        ValueError: a layer breaks the carry of its family, or a setting fits no parameter.
    """
    if plan.run.training.compile and plan.resolved.zero_stage == 3:
        raise ConfigError(
            "training.compile=true with ZeRO stage 3: its hooks gather parameters inside the "
            "compiled layers; use training.compile=false or stage 1 or 2"
        )
    if plan.ctx.pipeline.size > (num_parts := len(plan.specs())):
        raise ConfigError(
            f"parallel.pipeline={plan.ctx.pipeline.size} is more than the {num_parts} parts that "
            f"this model can be cut into; set parallel.pipeline to {num_parts} or less"
        )
    single = ParallelContext.single(device="meta")
    whole = SequentialModel(plan.specs(), single)
    check_multipliers(whole, plan.run.training.lr_multipliers)
    for length in plan.run.data.sequence_lengths:
        shape = (plan.run.training.batch_size, length)
        tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
        segments = tokens.int() if plan.segmented else None
        schema = plan.schema(single, seq_length=length)
        inputs = TokenInputs(tokens, segments)
        check_layers(plan.specs(), inputs, schema)
        if plan.run.training.z_loss:
            _check_z_loss(plan, whole(inputs))
    return whole


def _check_z_loss(plan: RunPlan, output: Any) -> None:
    logits = logits_of(output)
    if isinstance(logits, Tensor) and logits.shape[-1] == plan.run.model.vocab_size:
        return
    raise ConfigError(
        f"training.z_loss={plan.run.training.z_loss} has no effect: the head of the "
        f"{plan.family.name} family gives no logits over the vocabulary; set training.z_loss=0"
    )
