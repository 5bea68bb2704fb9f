"""Optimizers by name, parameter groups, and the gradient norm where DeepSpeed gives none."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.layers import VocabParallelEmbedding, VocabParallelHead
from pretrain.config import TrainingConfig
from pretrain.errors import ConfigError
from pretrain.experts import group_name, is_shared_by_expert_ranks


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    lr_multipliers: Mapping[str, float],
    expert_group: str = "",
) -> list[dict[str, Any]]:
    """Groups with equal weight decay and equal learning-rate multiplier, in a fixed order.

    Matrices decay; vectors (norms, biases) do not. A multiplier applies to every parameter whose
    name contains its key; the longest matching key wins. Parameters that expert ranks share have
    groups of their own, with the marks that DeepSpeed looks for and `expert_group` as their name.

    Raises:
        ConfigError: a key of `lr_multipliers` matches no parameter of this stage's model.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        keys = sorted((key for key in lr_multipliers if key in name), key=len)
        multiplier = lr_multipliers[keys[-1]] if keys else 1.0
        # ZeRO-3 leaves an empty tensor behind and keeps the shape beside it.
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        is_expert = is_shared_by_expert_ranks(parameter)
        key = (is_expert, weight_decay if decays else 0.0, multiplier)
        groups.setdefault(key, []).append(parameter)
    marks = {"moe": True, "name": expert_group}
    return [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier}
        | (marks if is_expert else {})
        for (is_expert, decay, multiplier), parameters in sorted(groups.items(), key=_first)
    ]


def _first(item: tuple[Any, Any]) -> Any:
    return item[0]


def check_multipliers(names: Iterable[str], lr_multipliers: Mapping[str, float]) -> None:
    """Refuse a multiplier that would have no effect. `names`: all parameters of the whole model.

    Raises:
        ConfigError: a key matches no parameter.
    """
    names = list(names)
    for key in lr_multipliers:
        if not any(key in name for name in names):
            raise ConfigError(
                f"training.lr_multipliers.{key}: no parameter name contains {key!r}; "
                f"names look like {', '.join(names[:3])}"
            )


def build_optimizer(
    module: nn.Module, config: TrainingConfig, ctx: ParallelContext
) -> torch.optim.Optimizer:
    """The optimizer named by `training.optimizer` over the parameters of this rank.

    Raises:
        ConfigError: the named implementation is not usable here; says what to install or choose.
    """
    groups = parameter_groups(
        module.named_parameters(),
        weight_decay=config.weight_decay,
        lr_multipliers=config.lr_multipliers,
        expert_group=group_name(ctx),
    )
    common = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.optimizer == "muon":
        return _muon(module, groups, common, config, ctx)
    return _FACTORIES[config.optimizer](groups, common)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """`lr = learning_rate * multiplier` for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_multiplier"]


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float, ctx: ParallelContext) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; returns the norm.

    `norm^2 = sum over tensor ranks of sharded parameters + replicated parameters once`. With
    `max_norm = 0` gradients stay as they are. Used where DeepSpeed wraps no optimizer (ZeRO-0 in
    fp32), because its engine then reports no norm.
    """
    sharded: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in module.parameters():
        if parameter.grad is not None:
            is_sharded = parameter.tensor_model_parallel  # type: ignore[attr-defined]
            (sharded if is_sharded else whole).append(parameter.grad)
    squared = _squared_norm(sharded, ctx.device)
    if ctx.tensor.size > 1:
        dist.all_reduce(squared, group=ctx.tensor.group)
    norm = (squared + _squared_norm(whole, ctx.device)).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(sharded + whole, scale)
    return norm


def spoil(loss: Tensor) -> Tensor:
    """`loss`, with a gradient that is NaN where the loss is not finite, and unchanged elsewhere."""
    return loss * (1 + 0 * loss.detach())


def drop_gradients_unless_finite(module: nn.Module, norm: Tensor) -> bool:
    """Let the optimizer step change nothing where the norm is not finite; whether it is.

    As DeepSpeed's own optimizers do, it waits for the device. Only where those are not in use.
    """
    finite = bool(norm.isfinite())
    if not finite:
        for parameter in module.parameters():
            parameter.grad = None
    return finite


def add_norms_at_once(optimizer: Any) -> None:
    """Let ZeRO-1 in fp32 compute the norm of all parameter groups together, under a pipeline.

    DeepSpeed (0.19.8, zero/stage_1_and_2.py, `scaled_global_norm`) adds up over stages group by
    group: where a stage has more groups than another, as with the multiplier of a layer that only
    one of them has, the run stands still.
    """
    if not hasattr(optimizer, "get_grad_norm_direct"):  # BF16_Optimizer does it right
        return

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        groups = range(len(optimizer.bit16_groups))
        if optimizer.cpu_offload:
            parameters = [p for i in groups for p in optimizer.params_in_partition[i]]
            return optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters)
        pairs: list[tuple[Tensor, nn.Parameter]] = []
        for i in groups:
            # After the gradients of its parameters a group may have padding, marked or not.
            real = (g for g in optimizer.averaged_gradients[i] if not hasattr(g, "_zero_padding"))
            pairs += zip(real, optimizer.params_in_partition[i], strict=False)
        gradients, parameters = [g for g, _ in pairs], [p for _, p in pairs]
        return optimizer.get_grad_norm_direct(gradients, parameters, norm_type)

    optimizer.scaled_global_norm = scaled_global_norm


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients)
    return torch.stack([n.float() for n in norms]).square().sum()


def _torch_adamw(groups: list[dict[str, Any]], common: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **common, fused=True)


def _deepspeed_fused_adam(groups: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    return _from("deepspeed.ops.adam", "FusedAdam", "fused_adam")(
        groups, **common, adam_w_mode=True
    )


def _deepspeed_cpu_adam(groups: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    cpu_adam = _from("deepspeed.ops.adam", "DeepSpeedCPUAdam", "cpu_adam")
    return cpu_adam(groups, **common, adamw_mode=True)


def _transformer_engine_adam(groups: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    adam = _from("transformer_engine.pytorch.optimizers", "FusedAdam", "te_adam")
    return adam(groups, **common, adam_w_mode=True)


def _apex_adam(groups: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    # A web toolkit is called apex on PyPI; NVIDIA's is told by what it contains.
    return _from("apex.optimizers", "FusedAdam", "apex_adam")(groups, **common, adam_w_mode=True)


_FACTORIES: dict[str, Callable[[list[dict[str, Any]], dict[str, Any]], torch.optim.Optimizer]] = {
    "adamw": _torch_adamw,
    "fused_adam": _deepspeed_fused_adam,
    "cpu_adam": _deepspeed_cpu_adam,
    "te_adam": _transformer_engine_adam,
    "apex_adam": _apex_adam,
}

_NEEDS = {
    "fused_adam": "DeepSpeed with a CUDA device and nvcc",
    "cpu_adam": "DeepSpeed and a C++ compiler",
    "te_adam": "Transformer Engine (pip install manyformer[fp8]) and a CUDA device",
    "apex_adam": "NVIDIA apex, built from its source (the apex on PyPI is another project)",
}


def _from(module: str, attribute: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # broken installs raise anything
        raise ConfigError(
            f"training.optimizer={name} needs {_NEEDS[name]} ({type(error).__name__}: {error}); "
            "install it or use training.optimizer=adamw"
        ) from error


def _muon(
    module: nn.Module,
    groups: list[dict[str, Any]],
    common: dict[str, Any],
    config: TrainingConfig,
    ctx: ParallelContext,
) -> torch.optim.Optimizer:
    """Muon for the matrices of hidden layers, AdamW for tables, head and vectors.

    Every matrix must be whole on its rank: orthogonalising a shard is another algorithm.

    Raises:
        ConfigError: tensor size > 1.
    """
    if ctx.tensor.size > 1:
        raise ConfigError(
            f"training.optimizer=muon with parallel.tensor={ctx.tensor.size}: Muon orthogonalises "
            "whole matrices, a tensor rank holds shards; use parallel.tensor=1 or another optimizer"
        )
    tables = [
        m for m in module.modules() if isinstance(m, VocabParallelEmbedding | VocabParallelHead)
    ]
    outer = {id(m.weight) for m in tables}
    split: list[dict[str, Any]] = []
    for group in groups:
        for use_muon in (True, False):
            members = []
            for parameter in group["params"]:
                matrix = len(getattr(parameter, "ds_shape", parameter.shape)) == 2
                if (matrix and id(parameter) not in outer) is use_muon:
                    parameter.use_muon = use_muon
                    members.append(parameter)
            if members:
                specific = {"lr": common["lr"]} if use_muon else common
                split.append({**group, **specific, "params": members, "use_muon": use_muon})
    if ctx.device.type == "cpu" and not config.compile:
        from pretrain.muon import BatchedMuon

        return BatchedMuon(split)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(split)
