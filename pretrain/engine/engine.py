"""One model, one layout, one DeepSpeed engine, behind the few calls that the loop needs.

At pipeline size 1 the model is a SequentialModel in DeepSpeed's plain engine (ZeRO 0-3), at larger
sizes a PipelineStage in its PipelineEngine (ZeRO-1). For the same samples both give the same
losses, terms and gradient norms.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_tools.loading.batch import Batch
from models.base import TokenInputs
from parallel.carry import AfterEach, LayerSpec, SequentialModel
from parallel.checkpoint.weights import Weight, module_weights
from parallel.context import ParallelContext
from parallel.layer_state import discard_layer_sums, update_layer_states
from parallel.sharding import all_experts, sharding_table, sum_partial_gradients
from parallel.wire import Wire
from pretrain.engine.deepspeed_moe import experts_found, register_experts
from pretrain.engine.loss_targets import Targets, count_scored
from pretrain.engine.optimizers import (
    add_norms_at_once,
    build_optimizer,
    changing_nothing,
    clip_gradients,
    forget_gradients,
    muon_accepted,
    set_learning_rate,
)
from pretrain.engine.partitions import clear_padding
from pretrain.engine.train_spec import RunPlan


class StepResult(NamedTuple):
    """What one optimizer step measured: means over all its samples, and the norm before clipping.

    Tensors stay on the device until someone reads them. `applied`: the loss and the norm are
    finite, or else nothing has changed; the same on all ranks.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    grad_norm: Tensor | float
    applied: bool


class Engine(Protocol):
    """Trains and evaluates the model of a run."""

    ctx: ParallelContext
    deepspeed: Any
    module: nn.Module

    def set_sequence_length(self, length: int) -> None:
        """The batches from here on have sequences of this length; called on all ranks alike."""

    @property
    def num_micro_batches(self) -> int:
        """Batches of each data rank that an optimizer step takes."""

    def set_num_micro_batches(self, number: int) -> None:
        """Steps from here on take so many batches; called on all ranks alike, between steps."""

    def train_step(self, batches: Iterator[Batch], *, learning_rate: float) -> StepResult:
        """One optimizer step over `num_micro_batches` batches of this data rank."""

    def evaluate(self, batches: Iterable[Batch], *, num_batches: int) -> float:
        """Sum, in nats, of the losses of every scored token in `num_batches` batches of all data
        ranks."""

    def weights(self) -> list[Weight]:
        """What this rank's checkpoint file of weights holds; loading them is collective."""


class PlainEngine:
    """Pipeline size 1: a loop of forward, backward and step over DeepSpeed's plain engine."""

    def __init__(self, deepspeed_engine: Any, plan: RunPlan) -> None:
        self.deepspeed = deepspeed_engine
        self.module: nn.Module = deepspeed_engine.module
        self.plan = plan
        self.ctx = plan.ctx
        needs_reduction = hasattr(deepspeed_engine.optimizer, "reduce_gradients")
        if plan.ctx.data.size == 1 and plan.resolved.zero_stage <= 1 and not needs_reduction:
            # ZeRO-0, and ZeRO-1 in bf16: with no other data rank DeepSpeed would still copy all
            # gradients to a buffer and back. Elsewhere the call also partitions them.
            deepspeed_engine.enable_backward_allreduce = False

    def set_sequence_length(self, length: int) -> None:
        """Nothing is kept that has the length of a sequence."""

    @property
    def num_micro_batches(self) -> int:
        number: int = self.deepspeed.gradient_accumulation_steps()
        return number

    def set_num_micro_batches(self, number: int) -> None:
        _set_accumulation(self.deepspeed, number)

    def train_step(self, batches: Iterator[Batch], *, learning_rate: float) -> StepResult:
        engine, clip_in_loop = self.deepspeed, self.plan.resolved.clip_in_loop
        set_learning_rate(engine.optimizer, learning_rate)
        names = ("loss", *self.plan.loss_names)
        sums = torch.zeros(len(names), device=self.ctx.device)
        norm: Tensor | float = 0.0
        applied = True
        num_scored = None
        if self.plan.segmented:
            batches, num_scored = count_scored(batches, self.num_micro_batches, self.ctx)
        for _ in range(self.num_micro_batches):
            inputs, labels = _to_device(next(batches), self.ctx.device)
            total, terms = self.plan.objective(engine(inputs), Targets(labels, num_scored))
            engine.backward(total)
            sums += torch.stack([total.detach(), *(terms[name].detach() for name in names[1:])])
            if clip_in_loop and engine.is_gradient_accumulation_boundary():
                norm = clip_gradients(self.module, self.plan.run.training.grad_clip, self.ctx)
                # As DeepSpeed's own optimizers do, it waits for the device.
                applied = bool(norm.isfinite())
            with contextlib.nullcontext() if applied else changing_nothing(engine.optimizer):
                engine.step()
        if not clip_in_loop:
            norm, applied = engine.get_global_grad_norm(), engine.was_step_applied()
        _finish_step(self, applied=applied)
        if self.ctx.data.size > 1:
            dist.all_reduce(sums, group=self.ctx.data.group)
        means = sums / (self.num_micro_batches * self.ctx.data.size)
        return StepResult(means[0], dict(zip(names[1:], means[1:], strict=True)), norm, applied)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], *, num_batches: int) -> float:
        self.deepspeed.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.ctx.device)
        for batch in batches:
            inputs, labels = _to_device(batch, self.ctx.device)
            total += self.plan.score(self.deepspeed(inputs), Targets(labels))[0].double()
        dist.all_reduce(total, group=self.ctx.data.group)
        self.deepspeed.train()
        return total.item()

    def weights(self) -> list[Weight]:
        is_partitioned = self.plan.resolved.zero_stage == 3
        read = _gathered if is_partitioned else partial(all_experts, ctx=self.ctx)
        return module_weights(self.module, read=read)


class PipelineEngine:
    """Pipeline size > 1: DeepSpeed's PipelineEngine schedules the micro-batches."""

    def __init__(self, deepspeed_engine: Any, plan: RunPlan) -> None:
        self.deepspeed = deepspeed_engine
        self.module: nn.Module = deepspeed_engine.module
        self.plan = plan
        self.ctx = plan.ctx
        self.sequence_length = plan.run.data.sequence_length

    def set_sequence_length(self, length: int) -> None:
        """Another wire, and new receive buffers: DeepSpeed keeps those of the first micro-batch."""
        if length != self.sequence_length:
            stage: Any = self.module
            stage.wire = Wire(self.plan.schema(self.ctx, seq_length=length))
            self.deepspeed.reset_activation_shape()
            self.sequence_length = length

    @property
    def num_micro_batches(self) -> int:
        number: int = self.deepspeed.micro_batches
        return number

    def set_num_micro_batches(self, number: int) -> None:
        _set_accumulation(self.deepspeed, number)

    def train_step(self, batches: Iterator[Batch], *, learning_rate: float) -> StepResult:
        set_learning_rate(self.deepspeed.optimizer, learning_rate)
        num_scored = None
        if self.plan.segmented and self.ctx.is_last_stage:
            batches, num_scored = count_scored(batches, self.num_micro_batches, self.ctx)
        loss = self.deepspeed.train_batch(self._pairs(batches, num_scored))
        applied = self.deepspeed.was_step_applied()
        _finish_step(self, applied=applied)
        terms = dict(self.deepspeed.agg_additional_losses)
        return StepResult(loss, terms, self.deepspeed.get_global_grad_norm(), applied)

    def evaluate(self, batches: Iterable[Batch], *, num_batches: int) -> float:
        with self._objective(self.plan.score):
            mean = self.deepspeed.eval_batch(
                self._pairs(iter(batches)), num_micro_batches=num_batches
            )
        # The engine averages over micro-batches and data ranks what `score` gave as sums.
        return mean.item() * num_batches * self.ctx.data.size

    def weights(self) -> list[Weight]:
        copies = [
            name
            for name, parameter in self.module.named_parameters()
            if parameter.ds_pipe_replicated  # type: ignore[attr-defined]
        ]
        return module_weights(self.module, read=partial(all_experts, ctx=self.ctx), skip=copies)

    def _pairs(
        self, batches: Iterator[Batch], num_scored: Tensor | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """(inputs, targets) as PipelineEngine pulls them, on the first and the last stage only."""
        for batch in batches:
            pair = TokenInputs(batch.tokens, batch.segment_ids), Targets(batch.labels, num_scored)
            inputs, targets = (tuple(x for x in each if x is not None) for each in pair)
            yield inputs, targets

    @contextmanager
    def _objective(self, objective: Callable[..., Any]) -> Iterator[None]:
        stage: Any = self.module
        usual, stage.objective = stage.objective, objective
        try:
            yield
        finally:
            stage.objective = usual


def build_engine(plan: RunPlan, *, load_layer: AfterEach | None = None) -> Engine:
    """Build this rank's part of a model that `check_model` accepts, for DeepSpeed (collective).

    `load_layer` may overwrite the initial weights of each layer.
    """
    run, ctx = plan.run, plan.ctx
    torch.manual_seed(run.training.seed)
    build = _build_stage if ctx.pipeline.size > 1 else _build_whole
    module = build(plan, _after_each(plan, load_layer))
    sharding_table(module)
    register_experts(module, ctx)
    sum_partial_gradients(module, ctx)
    if run.training.compile:
        compile_layers(module, num_lengths=len(plan.run.data.sequence_lengths))
    engine = _initialize(module, plan)
    return (PipelineEngine if ctx.pipeline.size > 1 else PlainEngine)(engine, plan)


def compile_layers(module: nn.Module, *, num_lengths: int, **options: Any) -> None:
    """Compile every layer, to train and to be evaluated at so many lengths of a sequence.

    Equal layers share their code, so that start-up does not grow with depth. `options`: of
    torch.compile.
    """
    # Beyond its limit, 8 variants of a `forward`, torch (2.13) runs layers uncompiled and only
    # warns. A family has a few kinds of blocks, each in training and in evaluation.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 16 * num_lengths)
    for layer in module.children():
        layer.compile(dynamic=False, **options)


def _build_whole(plan: RunPlan, after_each: AfterEach) -> nn.Module:
    return SequentialModel(
        plan.specs(),
        plan.ctx,
        seed=plan.run.training.seed,
        recompute=plan.run.training.activation_recomputation == "full",
        after_each=after_each,
    )


def _after_each(plan: RunPlan, load_layer: AfterEach | None) -> AfterEach:
    """Load each layer once it is built; under ZeRO-3 partition it, so that no rank holds all."""

    def finish(spec: LayerSpec, layer: nn.Module) -> None:
        if load_layer is not None:
            load_layer(spec, layer)
        if plan.resolved.zero_stage == 3:
            import deepspeed

            # DeepSpeed casts the module later, but by then the parameters are elsewhere: they would
            # stay in fp32 (0.19.8).
            layer.to(plan.ctx.precision.dtype)
            # Without a group DeepSpeed partitions over all ranks, tensor ranks too, and broadcasts
            # one's shards to the others: training then runs, with wrong weights.
            deepspeed.zero.Init(
                layer,
                data_parallel_group=plan.ctx.data.group,
                config_dict_or_path=plan.resolved.config,
                mpu=_mpu(plan.ctx),
            )
            clear_padding(layer.parameters())

    return finish


def _build_stage(plan: RunPlan, after_each: AfterEach) -> nn.Module:
    from parallel.pipeline import PipelineStage

    return PipelineStage(
        plan.specs(),
        plan.ctx,
        schema=plan.schema(plan.ctx, seq_length=plan.run.data.sequence_length),
        inputs_type=TokenInputs,
        objective=plan.objective,
        loss_names=plan.loss_names,
        seed=plan.run.training.seed,
        recompute=plan.run.training.activation_recomputation == "full",
        after_each=after_each,
    )


def _initialize(module: nn.Module, plan: RunPlan) -> Any:
    import deepspeed

    optimizer = build_optimizer(module, plan.run.training, plan.ctx)
    quiet = contextlib.redirect_stdout(io.StringIO())  # it prints its use of memory in bf16
    is_muon = plan.run.training.optimizer == "muon"
    muon = muon_accepted() if is_muon else contextlib.nullcontext()
    with quiet, experts_found(plan.ctx), muon:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=plan.resolved.config,
            mpu=None if plan.ctx.pipeline.size > 1 else _mpu(plan.ctx),
        )
    if plan.ctx.pipeline.size > 1:
        add_norms_at_once(engine.optimizer)
    return engine


def _mpu(ctx: ParallelContext) -> Any:
    """What tells DeepSpeed about the tensor axis; PipelineModule tells it itself."""
    if ctx.tensor.size == 1:
        return None
    from parallel.megatron import DeepSpeedTopology

    return DeepSpeedTopology()


def _set_accumulation(engine: Any, number: int) -> None:
    """Let DeepSpeed accumulate over `number` micro-batches from the next step on."""
    micro_batch, data_size = engine.train_micro_batch_size_per_gpu(), engine.dp_world_size
    engine.set_train_batch_size(number * micro_batch * data_size)
    # The plain engine takes a step where its count of micro-batches is a multiple of their number
    # (0.19.8, is_gradient_accumulation_boundary): that count is of steps of the former size.
    engine.micro_steps = 0


def _finish_step(engine: Engine, *, applied: bool) -> None:
    """Let layers learn from a step; of one that is left out nothing may stay behind."""
    if applied:
        update_layer_states(engine.module, ctx=engine.ctx)
    else:
        discard_layer_sums(engine.module)
        forget_gradients(engine.deepspeed.optimizer)


def _gathered(parameter: Tensor) -> Tensor:
    """A parameter that ZeRO-3 has partitioned, whole (collective over data ranks)."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _to_device(batch: Batch, device: torch.device) -> tuple[TokenInputs, Tensor]:
    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    segment_ids = None if batch.segment_ids is None else move(batch.segment_ids)
    return TokenInputs(move(batch.tokens), segment_ids), move(batch.labels)
