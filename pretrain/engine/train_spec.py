"""Specification of training: model, objective and layout, and their checks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_tools.loading.batch import IGNORED_LABEL, Batch
from models.base import ModelFamily, TokenInputs, logits_of
from models.registry import get_family
from parallel.carry import LayerSpec, SequentialModel, check_layers
from parallel.checkpoint.errors import one_line
from parallel.context import Axis, ParallelContext
from parallel.cross_entropy import (
    LogitsInParts,
    logits_used_once,
    set_logits_parts,
    vocab_parallel_z_losses,
)
from parallel.decisions import observed_decisions
from parallel.precision import Precision
from pretrain.config import RunConfig
from pretrain.config.deepspeed import DeepSpeedSettings
from pretrain.engine.optimizers import propagate_nonfinite
from pretrain.engine.parameter_groups import check_multipliers
from pretrain.errors import ConfigError

Z_LOSS = "z_loss"
# Parameters times tokens of a batch, and pairs of tokens of its rows, up to which `check_model`
# computes: tenths of a second. For the arithmetic of the meta device torch (2.13) imports
# torch._dynamo and sympy: two seconds.
_SMALL = 1e10
_SHORT = 1 << 22


class Targets(NamedTuple):
    """Targets of the loss.

    `labels`: int64 [b, s], -100 = not scored. `num_scored`: scalar, see `ModelFamily.loss`.
    """

    labels: Tensor
    num_scored: Tensor | None = None


class TrainSpec(NamedTuple):
    """Settings, model family and layout shared by every part of an engine."""

    config: RunConfig
    ds_config: DeepSpeedSettings
    family: ModelFamily
    ctx: ParallelContext

    @classmethod
    def of(cls, config: RunConfig, ds_config: DeepSpeedSettings, ctx: ParallelContext) -> TrainSpec:
        return cls(config, ds_config, get_family(config.model.family), ctx)

    @property
    def segmented(self) -> bool:
        return self.config.data.reset_at_documents

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The terms that `objective` reports."""
        extra = (Z_LOSS,) if self.config.training.z_loss else ()
        return (*self.family.loss_names, *extra)

    def layer_specs(self) -> list[LayerSpec]:
        return self.family.layer_specs(self.config.model, segmented=self.segmented)

    def schema(self, ctx: ParallelContext, *, seq_length: int) -> Any:
        return self.family.carry_schema(
            self.config.model,
            ctx,
            micro_batch_size=self.config.training.batch_size,
            seq_length=seq_length,
            segmented=self.segmented,
        )

    def objective(self, output: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that training minimises, and the terms that it reports.

        `targets`: Targets, or the tuple of its fields that PipelineEngine makes of it.
        """
        labels, num_scored = Targets(*targets)
        with logits_used_once(not self.config.training.z_loss):
            total, terms = self.family.loss(
                output, labels, config=self.config.model, ctx=self.ctx, num_scored=num_scored
            )
        if self.config.training.z_loss:
            z_loss = self._z_loss(logits_of(output), labels, num_scored)
            total = total + self.config.training.z_loss * z_loss
            terms = terms | {Z_LOSS: z_loss.detach()}
        return propagate_nonfinite(total), terms

    def _z_loss(self, logits: Tensor, labels: Tensor, num_scored: Tensor | None) -> Tensor:
        """Mean of `(log Z)^2` over scored tokens, counted as for lm_loss."""
        if num_scored is None:
            num_scored = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return vocab_parallel_z_losses(logits, labels, ctx=self.ctx).sum() / num_scored


def build_precision(config: RunConfig) -> Precision:
    """The precision of the run.

    Raises:
        ConfigError: FP8 is not available on this machine.
    """
    try:
        training = config.training
        return Precision(training.precision, training.fp8_recipe, training.fp8_backend)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from error


def build_context(
    config: RunConfig, *, precision: Precision, device: torch.device
) -> ParallelContext:
    """Build the parallel layout of the run over the initialised process group (collective)."""
    return ParallelContext.from_world(
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        expert=config.parallel.expert,
        sequence_parallel=config.parallel.sequence_parallel,
        precision=precision,
        device=device,
    )


def check_model(spec: TrainSpec) -> SequentialModel:
    """Run the layers on the meta device, to find wrong shapes and names without memory.

    Those of a small model with short rows run on the CPU, which takes less time. Returns the whole
    model, on the meta device.

    Raises:
        ValueError: a layer breaks the carry of its family, a setting fits no parameter, or the
            model has fewer layers than the pipeline stages.
    """
    if spec.config.training.compile and spec.ds_config.zero_stage == 3:
        raise ConfigError(
            "training.compile=true with ZeRO stage 3: its hooks gather parameters inside the "
            "compiled layers; use training.compile=false or stage 1 or 2"
        )
    if spec.ctx.pipeline.size > 1:
        from parallel.pipeline import check_num_stages

        check_num_stages(len(spec.layer_specs()), spec.ctx.pipeline.size)
    precision = _check_fp8_sizes(spec) if spec.ctx.precision.is_fp8 else Precision()
    single = ParallelContext.single(device="meta", precision=precision)
    whole = SequentialModel(spec.layer_specs(), single).to(precision.dtype)
    check_multipliers(whole, spec.config.training.lr_multipliers)
    lengths, batch_size = spec.config.data.sequence_lengths, spec.config.training.batch_size
    num_tokens = batch_size * max(lengths)
    is_small = sum(p.numel() for p in whole.parameters()) * num_tokens <= _SMALL
    model = whole
    if is_small and num_tokens * max(lengths) <= _SHORT:
        single = ParallelContext.single(precision=precision)
        model = SequentialModel(spec.layer_specs(), single).to(precision.dtype)
    with observed_decisions(None):
        for length in lengths:
            _check_passes(spec, model, single, shape=(batch_size, length))
    return whole


def _check_passes(
    spec: TrainSpec, model: SequentialModel, single: ParallelContext, *, shape: tuple[int, int]
) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64, device=single.device)
    segments = tokens.int() if spec.segmented else None
    schema = spec.schema(single, seq_length=shape[1])
    check = _check_fp8_rows if single.precision.is_fp8 else check_layers
    carry = check(model, TokenInputs(tokens, segments), schema)
    if spec.config.training.z_loss:
        _check_z_loss(spec, model.layers[-1](carry))
    if spec.config.training.logits_parts > 1:
        _check_logits_parts(spec, model.layers[-1], carry, labels=tokens)


def _check_fp8_sizes(spec: TrainSpec) -> Precision:
    """Refuse shards that FP8 products cannot have; returns a precision for checks of their rows.

    It is the emulated one, which refuses the same numbers and needs no device.
    """
    precision = Precision("fp8", spec.ctx.precision.fp8_recipe, "emulated")
    ctx = ParallelContext(
        tensor=Axis(spec.ctx.tensor.size), precision=precision, device=torch.device("meta")
    )
    checked: list[tuple[type, Any]] = []
    for layer in spec.layer_specs():
        if (layer.module, layer.kwargs) in checked:
            continue
        checked.append((layer.module, layer.kwargs))
        try:
            layer.module(ctx=ctx, **layer.kwargs)
        except ValueError as error:
            raise ConfigError(f"{layer.name}: {error}") from error
    return precision


def _check_fp8_rows(whole: SequentialModel, inputs: TokenInputs, schema: Any) -> Any:
    """`check_layers`, the last layer included, of a model whose products are in FP8."""
    try:
        carry = check_layers(whole, inputs, schema)
        whole.layers[-1](carry)
        return carry
    except ValueError as error:
        batch_size, length = inputs.tokens.shape
        raise ConfigError(
            f"training.batch_size={batch_size} with sequences of {length}: {error}"
        ) from error


def _check_z_loss(spec: TrainSpec, output: Any) -> None:
    logits = logits_of(output)
    if isinstance(logits, Tensor) and logits.shape[-1] == spec.config.model.vocab_size:
        return
    raise ConfigError(
        f"training.z_loss={spec.config.training.z_loss} has no effect: the head of the "
        f"{spec.family.name} family gives no logits over the vocabulary; set training.z_loss=0"
    )


def _check_logits_parts(spec: TrainSpec, head: nn.Module, carry: Any, *, labels: Tensor) -> None:
    parts, name = spec.config.training.logits_parts, spec.family.name
    head(carry)  # whole: what it raises has nothing to do with parts
    set_logits_parts(head, parts)
    single = ParallelContext.single(device=labels.device)
    try:
        output = head(carry)
        in_parts = isinstance(logits_of(output), LogitsInParts)
        # A loss may ask for values, which the meta device has not.
        with contextlib.suppress(RuntimeError):
            spec.family.loss(output, labels, config=spec.config.model, ctx=single)
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"training.logits_parts={parts}: the head or the loss of the {name} family needs its "
            f"logits as a tensor ({one_line(error)}); set training.logits_parts=1, or let nothing "
            "but the losses of parallel.cross_entropy read what vocab_logits returns"
        ) from error
    if not in_parts:
        raise ConfigError(
            f"training.logits_parts={parts} has no effect: the head of the {name} family computes "
            "its logits whole, not by vocab_logits(self.output, x); set training.logits_parts=1"
        )
    set_logits_parts(head, 1)


def count_scored(
    batches: Iterator[Batch], num_batches: int, ctx: ParallelContext
) -> tuple[Iterator[Batch], Tensor]:
    """The next `num_batches` batches, and their mean number of scored tokens over all data ranks.

    Counted on the host before the transfer and summed over data ranks on the device, without a
    synchronisation. Collective over data ranks.
    """
    step = list(itertools.islice(batches, num_batches))
    own = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in step)
    total = torch.full((), float(own), device=ctx.device)
    if ctx.data.size > 1:
        dist.all_reduce(total, group=ctx.data.group)
    return iter(step), total.clamp(min=1) / (num_batches * ctx.data.size)
