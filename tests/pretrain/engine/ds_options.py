"""Every key that a DeepSpeed JSON may hold, with a value to try, and runs that try them."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from data_tools.loading.batch import Batch
from parallel.checkpoint.weights import ShardPosition, write_shard
from parallel.context import ParallelContext
from pretrain.checkpointing.index import FOLDER, shard_name
from pretrain.checkpointing.optimizer_shards import MASTER, StoredOptimizer
from pretrain.config import RunConfig
from pretrain.config.deepspeed import layout_bound_by, resolve_ds_config
from pretrain.distributed.process_groups import process_group
from pretrain.engine.build import build_engine
from pretrain.engine.train_spec import TrainSpec, build_context, build_precision
from pretrain.errors import ConfigError
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.layout import SEQUENCES, Layout
from tests.pretrain.tiny_run import SEQ, VOCAB, tiny_run

STEPS = 2
_SMALL = 1000  # elements; every matrix of the model has more, and a bucket then holds one

# Key -> the settings that try it, each a file of its own.
TRIED: dict[str, list[dict[str, Any]]] = {
    "bf16.immediate_grad_update": [{"bf16.immediate_grad_update": False}],
    "wall_clock_breakdown": [{"wall_clock_breakdown": True}],
    "flops_profiler.enabled": [{"flops_profiler.enabled": True}],
    "communication_data_type": [{"communication_data_type": "bf16"}],
    **{
        f"zero_optimization.{name}": [{f"zero_optimization.{name}": value}]
        for name, value in {
            "contiguous_gradients": False,
            "reduce_scatter": False,
            "reduce_bucket_size": _SMALL,
            "use_multi_rank_bucket_allreduce": False,
            "allgather_bucket_size": _SMALL,
            "ignore_unused_parameters": False,
            "round_robin_gradients": True,
            "parameter_alignment": True,
            "sub_group_size": _SMALL,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 100,
            "stage3_max_live_parameters": _SMALL,
            "stage3_max_reuse_distance": 0,
            "stage3_use_all_reduce_for_fetch_params": True,
            "stage3_allgather_sequential": True,
            "memory_efficient_linear": False,
            "override_module_apply": False,
            "enable_sanity_checks": True,
        }.items()
    },
    "zero_optimization.overlap_comm": [
        {"zero_optimization.overlap_comm": True},
        {
            "zero_optimization.overlap_comm": True,
            "zero_optimization.reduce_bucket_size": _SMALL,
        },
        {
            "zero_optimization.overlap_comm": True,
            "zero_optimization.contiguous_gradients": False,
        },
    ],
    # Without memory of its own the device is what the layouts say, which are tried with each.
    "zero_optimization.offload_optimizer.pin_memory": [
        {"zero_optimization.offload_optimizer": {"device": "cpu", "pin_memory": False}}
    ],
    "zero_optimization.offload_param.pin_memory": [
        {"zero_optimization.offload_param": {"device": "cpu", "pin_memory": False}}
    ],
}
# Key -> value of what only reports; all of them are tried together.
REPORTS: dict[str, Any] = {
    "steps_per_print": 1,
    "memory_breakdown": True,
    "dump_state": True,
    "log_level": "info",
    "timers.throughput.enabled": True,
    "timers.throughput.synchronized": True,
    "comms_logger.enabled": True,
    "comms_logger.prof_all": True,
    "comms_logger.prof_ops": [],
    "comms_logger.verbose": False,
    "comms_logger.debug": False,
    "flops_profiler.recompute_fwd_factor": 0.0,
    "flops_profiler.profile_step": 1,
    "flops_profiler.module_depth": 1,
    "flops_profiler.top_modules": 1,
    "flops_profiler.detailed": False,
    "zero_optimization.log_trace_cache_warnings": True,
}
# Key -> why there is no value of it to try.
NOT_TRIED = {
    "flops_profiler.output_file": "where the report goes",
    "disable_python_gc": "when Python frees memory",
    "zero_optimization.stage": "part of the layout",
    "zero_optimization.offload_optimizer.device": "part of the layout",
    "zero_optimization.offload_param.device": "part of the layout",
}


def leaves(schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a table of accepted keys."""
    for name, kind in schema.items():
        if isinstance(kind, dict):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


OPTIMIZER, BOTH = ("offload_optimizer",), ("offload_optimizer", "offload_param")
LAYOUTS = {
    "ZeRO-0 DP2": Layout(data=2, stage=0),
    "ZeRO-1": Layout(),
    "ZeRO-1 offload": Layout(offload=OPTIMIZER),
    "ZeRO-1 DP2": Layout(data=2),
    "ZeRO-1 DP2 offload": Layout(data=2, offload=OPTIMIZER),
    "ZeRO-2": Layout(stage=2),
    "ZeRO-2 DP2": Layout(data=2, stage=2),
    "ZeRO-2 DP2 offload": Layout(data=2, stage=2, offload=OPTIMIZER),
    "ZeRO-3": Layout(stage=3),
    "ZeRO-3 DP2": Layout(data=2, stage=3),
    "ZeRO-3 DP2 offload": Layout(data=2, stage=3, offload=BOTH),
    "TP2": Layout(tensor=2),
    "TP2 offload": Layout(tensor=2, offload=OPTIMIZER),
    "TP2 ZeRO-2": Layout(tensor=2, stage=2),
    "TP2 DP2 ZeRO-3": Layout(tensor=2, data=2, stage=3),
    "PP2": Layout(pipeline=2),
    "PP2 offload": Layout(pipeline=2, offload=OPTIMIZER),
    "PP2 DP2 offload": Layout(pipeline=2, data=2, offload=OPTIMIZER),
    "PP2 TP2": Layout(pipeline=2, tensor=2),
    "EP2": Layout(data=2, expert=2),
    "EP2 offload": Layout(data=2, expert=2, offload=OPTIMIZER),
    "EP2 ZeRO-2": Layout(data=2, expert=2, stage=2),
}
# Tied embeddings; a vocabulary of 61 leaves padding rows at two tensor ranks.
_DENSE = {"model__tie_embeddings": True}
_EXPERTS = {"model": CASES["mod_experts"].config.model_dump()}
# An eps far above every gradient makes AdamW's update the gradient times lr / eps, so that errors
# of gradients stay what they are; its own update would turn the small ones into any sign.
_LINEAR = {
    "training__eps": 1e3,
    "training__lr": 5e2,
    "training__betas": [0.0, 0.95],
    "training__weight_decay": 1e-4,
    "training__schedule": "constant",
    "training__warmup_steps": 0,
}


def config_of(layout: Layout, precision: str, directory: Path, *, experts: bool) -> RunConfig:
    changes = {**_LINEAR, **(_EXPERTS if experts else _DENSE), **layout.changes}
    return tiny_run(directory, **changes, training__precision=precision)


class Trained(NamedTuple):
    """Losses and gradient norms of the steps, and where the optimizer's elements were written.

    `folder` is None where only DeepSpeed knows which element is whose.
    """

    losses: list[float]
    norms: list[float]
    folder: Path | None

    def masters(self) -> dict[str, torch.Tensor]:
        assert self.folder is not None
        return StoredOptimizer(self.folder / FOLDER).full()[MASTER]


def train(
    config: RunConfig, files: Mapping[str, dict[str, Any]], directory: Path, *, steps: int = STEPS
) -> dict[str, Trained | str]:
    """Train a few steps with each file, one after the other; a string says why one is refused.

    Whatever it is, it is the same on every rank.
    """
    parallel = config.parallel
    world = parallel.tensor * parallel.pipeline * (SEQUENCES // config.training.batch_size)
    results = run_ranks(
        _train_each, world, config, files, directory, steps, init=False, timeout=600.0
    )
    assert all(result == results[0] for result in results)
    return results[0]


def _train_each(
    config: RunConfig, files: Mapping[str, dict[str, Any]], directory: Path, steps: int
) -> dict[str, Trained | str]:
    found: dict[str, Trained | str] = {}
    with process_group(tensor_size=config.parallel.tensor) as device:
        ctx = build_context(config, precision=build_precision(config), device=device)
        for name, values in files.items():
            print(f"--- {name}", flush=True)  # told in the log of a rank that fails
            try:
                spec = _spec(config, values, directory, ctx)
            except ConfigError as error:
                found[name] = re.sub(r"^\S+: ", "", str(error))  # without the path
                continue
            folder = None if layout_bound_by(config, spec.ds_config) else directory / name
            found[name] = _train(spec, folder, steps)
            gc.collect()
    return found


def _spec(
    config: RunConfig, values: dict[str, Any], directory: Path, ctx: ParallelContext
) -> TrainSpec:
    path = directory / f"{dist.get_rank()}.json"
    path.write_text(json.dumps(values))
    return TrainSpec.of(config, resolve_ds_config(path, config, data_size=ctx.data.size), ctx)


class _Sums(TorchDispatchMode):
    """Notes the dtypes of floating tensors, not scalars, that collectives sum over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in str(func) and "reduce" in str(func):
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.numel() > 1:
                    self.dtypes |= {tensor.dtype} & {torch.float32, torch.bfloat16, torch.float16}
        return func(*args, **(kwargs or {}))


def dtypes_of_sums(config: RunConfig, values: dict[str, Any], directory: Path) -> set[torch.dtype]:
    """On a rank: in which precision a step sums anything over ranks."""
    with process_group(tensor_size=config.parallel.tensor) as device:
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ctx = build_context(config, precision=build_precision(config), device=device)
        spec = _spec(config, values, directory, ctx)
        engine, count = build_engine(spec), config.training.gradient_accumulation_steps
        with _Sums() as sums:
            engine.train_step(_batches(0, count, ctx), learning_rate=config.training.lr)
    return sums.dtypes


def _train(spec: TrainSpec, folder: Path | None, steps: int) -> Trained:
    engine = build_engine(spec)
    losses, norms = [], []
    for step in range(steps):
        batches = _batches(step, spec.config.training.gradient_accumulation_steps, spec.ctx)
        result = engine.train_step(batches, learning_rate=spec.config.training.lr)
        assert result.applied
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    if folder is not None:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        shard = engine.optimizer_shard()
        with open(folder / FOLDER / shard_name(dist.get_rank()), "wb") as file:
            position = ShardPosition.of(spec.ctx)
            write_shard(file, shard.elements, position=position, metadata=shard.metadata)
    dist.barrier()
    return Trained(losses, norms, folder)


def _batches(step: int, count: int, ctx: ParallelContext) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(100 + step)
    for _ in range(count):
        text = torch.randint(VOCAB, (SEQUENCES, SEQ + 1), generator=generator)
        own = text.chunk(ctx.data.size)[ctx.data.rank]
        yield Batch(own[:, :-1].contiguous(), own[:, 1:].contiguous(), None)
