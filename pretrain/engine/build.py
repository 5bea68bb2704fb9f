"""Build this rank's part of the model and hand it to DeepSpeed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.base import TokenInputs
from parallel.carry import AfterEach, LayerSpec, SequentialModel
from parallel.context import ParallelContext
from parallel.cross_entropy import set_logits_parts
from parallel.sharding import sharding_table, sum_partial_gradients
from pretrain.engine.deepspeed_moe import patched_moe_detection, register_experts
from pretrain.engine.engine import Engine, PlainEngine, StageEngine
from pretrain.engine.optimizers import (
    add_gradients_in_place,
    allow_empty_norms,
    build_optimizer,
    fuse_group_norms,
    patched_muon_check,
)
from pretrain.engine.partitions import clear_padding
from pretrain.engine.topology import DeepSpeedTopology
from pretrain.engine.train_spec import TrainSpec


def build_engine(
    spec: TrainSpec,
    *,
    load_layer: AfterEach | None = None,
    progress: Callable[[str], object] = lambda part: None,
) -> Engine:
    """Build this rank's part of a model that `check_model` has accepted (collective).

    Args:
        load_layer: may overwrite the initial weights of each layer.
        progress: called after each layer, with its name, and before DeepSpeed takes over.
    """
    training, ctx = spec.config.training, spec.ctx
    torch.manual_seed(training.seed)
    build = _build_stage if ctx.pipeline.size > 1 else _build_whole
    finish = _after_each(spec, load_layer)

    def finish_and_report(layer_spec: LayerSpec, layer: nn.Module) -> None:
        finish(layer_spec, layer)
        progress(f"after {layer_spec.name}")

    module = build(spec, finish_and_report)
    progress("DeepSpeed's part")
    sharding_table(module)
    register_experts(module, ctx)
    sum_partial_gradients(module, ctx)
    if training.compile:
        compile_layers(module, num_lengths=len(spec.config.data.sequence_lengths))
    engine = _initialize(module, spec)
    return (StageEngine if ctx.pipeline.size > 1 else PlainEngine)(engine, spec)


def compile_layers(module: nn.Module, *, num_lengths: int, **options: Any) -> None:
    """Compile every layer, for training and evaluation at `num_lengths` sequence lengths.

    Equal layers share compiled code, so start-up does not grow with depth. `options`: of
    torch.compile.
    """
    # Beyond its limit, 8 variants of a `forward`, torch (2.13) runs layers uncompiled and only
    # warns. A family has a few kinds of blocks, each in training and in evaluation.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 16 * num_lengths)
    for layer in module.children():
        layer.compile(dynamic=False, **options)


def _build_whole(spec: TrainSpec, after_each: AfterEach) -> nn.Module:
    return SequentialModel(
        spec.layer_specs(),
        spec.ctx,
        seed=spec.config.training.seed,
        recompute=spec.config.training.activation_recomputation == "full",
        after_each=after_each,
    )


def _after_each(spec: TrainSpec, load_layer: AfterEach | None) -> AfterEach:
    """Load each layer once built; under ZeRO-3 partition it, so that no rank holds the model."""

    head = spec.layer_specs()[-1].name

    def finish(layer_spec: LayerSpec, layer: nn.Module) -> None:
        if layer_spec.name == head:
            set_logits_parts(layer, spec.config.training.logits_parts)
        if load_layer is not None:
            load_layer(layer_spec, layer)
        if spec.ds_config.zero_stage == 3:
            import deepspeed

            # DeepSpeed casts the module later, when the parameters are already partitioned: they
            # would stay in fp32 (0.19.8).
            layer.to(spec.ctx.precision.dtype)
            # Without a group DeepSpeed partitions over all ranks, tensor ranks included, and
            # broadcasts one rank's shards to the others: training runs, with wrong weights.
            deepspeed.zero.Init(
                layer,
                data_parallel_group=spec.ctx.data.group,
                config_dict_or_path=spec.ds_config.values,
                mpu=_mpu(spec.ctx),
            )
            clear_padding(layer.parameters())

    return finish


def _build_stage(spec: TrainSpec, after_each: AfterEach) -> nn.Module:
    from parallel.pipeline import PipelineStage

    return PipelineStage(
        spec.layer_specs(),
        spec.ctx,
        schema=spec.schema(spec.ctx, seq_length=spec.config.data.sequence_length),
        inputs_type=TokenInputs,
        objective=spec.objective,
        loss_names=spec.loss_names,
        seed=spec.config.training.seed,
        recompute=spec.config.training.activation_recomputation == "full",
        after_each=after_each,
    )


def _initialize(module: nn.Module, spec: TrainSpec) -> Any:
    import deepspeed

    optimizer = build_optimizer(module, spec.config.training, spec.ctx)
    quiet = contextlib.redirect_stdout(io.StringIO())  # it prints its memory use in bf16
    is_muon = spec.config.training.optimizer == "muon"
    muon = patched_muon_check() if is_muon else contextlib.nullcontext()
    with quiet, patched_moe_detection(spec.ctx), muon:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=spec.ds_config.values,
            mpu=None if spec.ctx.pipeline.size > 1 else _mpu(spec.ctx),
        )
    add_gradients_in_place(engine.optimizer)
    allow_empty_norms(engine.optimizer)
    if spec.ctx.pipeline.size > 1:
        fuse_group_norms(engine.optimizer)
    return engine


def _mpu(ctx: ParallelContext) -> DeepSpeedTopology | None:
    """The `mpu` object that describes the tensor axis; PipelineModule brings its own."""
    return None if ctx.tensor.size == 1 else DeepSpeedTopology(ctx)
