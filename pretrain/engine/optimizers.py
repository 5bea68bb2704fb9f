"""Optimizers by name, and gradient clipping where DeepSpeed does none."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.context import ParallelContext
from pretrain.config import TrainingConfig
from pretrain.engine.deepspeed_moe import group_name
from pretrain.engine.parameter_groups import parameter_groups
from pretrain.errors import ConfigError


def build_optimizer(
    module: nn.Module, config: TrainingConfig, ctx: ParallelContext
) -> torch.optim.Optimizer:
    """The optimizer named by `training.optimizer` over the parameters of this rank.

    Raises:
        ConfigError: the named implementation is not usable here; says what to install or choose.
    """
    groups = parameter_groups(module, config, expert_group=group_name(ctx))
    common = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.optimizer == "muon":
        return _muon(groups, common, config, ctx)
    return _FACTORIES[config.optimizer](groups, common)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """`lr = learning_rate * multiplier` for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_multiplier"]


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float, ctx: ParallelContext) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; returns the norm.

    `norm^2 = sum over tensor ranks of sharded parameters + replicated parameters once`. With
    `max_norm = 0` gradients are not scaled. Used where DeepSpeed wraps no optimizer (ZeRO-0 in
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


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Give `loss` a NaN gradient if it is not finite; value and gradient unchanged otherwise."""
    return loss * (1 + 0 * loss.detach())


@contextmanager
def without_update(optimizer: Any) -> Iterator[None]:
    """Context in which the step of an optimizer that DeepSpeed does not wrap is a no-op.

    Setting gradients to None is not enough: Muon treats them as zeros and decays the weights.
    """
    optimizer.step = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del optimizer.step


def drop_averaged_gradients(optimizer: Any) -> None:
    """Drop the gradient sums of a step that DeepSpeed skipped.

    With `offload_optimizer`, ZeRO-1 and 2 in bf16 keep those sums and add the next step's to them
    (0.19.8, zero/stage_1_and_2.py, `step`): one NaN would make every later step NaN.
    """
    if getattr(optimizer, "cpu_offload", False):
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)


def fuse_group_norms(optimizer: Any) -> None:
    """Let ZeRO-1 in fp32 compute the norm of all parameter groups together, under a pipeline.

    DeepSpeed (0.19.8, zero/stage_1_and_2.py, `scaled_global_norm`) reduces over stages group by
    group: if one stage has more groups than another, for example through the learning-rate
    multiplier of a layer that only one of them has, the run hangs.
    """
    if not hasattr(optimizer, "get_grad_norm_direct"):  # BF16_Optimizer is not affected
        return

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        groups = range(len(optimizer.bit16_groups))
        if optimizer.cpu_offload:
            parameters = [p for i in groups for p in optimizer.params_in_partition[i]]
            return optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters)
        pairs: list[tuple[Tensor, nn.Parameter]] = []
        for i in groups:
            # The gradients of a group may be followed by padding, marked or not.
            real = (g for g in optimizer.averaged_gradients[i] if not hasattr(g, "_zero_padding"))
            pairs += zip(real, optimizer.params_in_partition[i], strict=False)
        gradients, parameters = [g for g, _ in pairs], [p for _, p in pairs]
        return optimizer.get_grad_norm_direct(gradients, parameters, norm_type)

    optimizer.scaled_global_norm = scaled_global_norm


def allow_empty_norms(optimizer: Any) -> None:
    """Let a rank whose gradients all count on other ranks take part in the norm, in bf16.

    Such as a second tensor rank of a stage that holds only norms and a tied matrix: BF16_Optimizer
    (DeepSpeed 0.19.8, `step`) stacks the norms of no tensors, which raises.
    """
    if not hasattr(optimizer, "get_grads_for_norm"):  # BF16_Optimizer alone has it
        return
    gradients_of = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        found = gradients_of(for_clipping)
        if not for_clipping and not found[0]:
            found[0].append(optimizer.fp32_groups_flat_partition[0].new_zeros(1))
        return found

    optimizer.get_grads_for_norm = get_grads_for_norm


def add_gradients_in_place(optimizer: Any) -> None:
    """Add a bf16 gradient to its fp32 sum without an fp32 copy of it.

    BF16_Optimizer (DeepSpeed 0.19.8, `_update_hp_grad`) makes that copy of each parameter in every
    micro-batch. Widening is exact, so the sums keep their bits. With
    `bf16.immediate_grad_update`, by which a gradient is added as soon as it is there and then
    freed, a micro-batch moves 10 bytes per parameter, and otherwise 26.
    """
    if not hasattr(optimizer, "_update_hp_grad"):  # BF16_Optimizer alone has it
        return

    def update(parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index]
        with torch.no_grad():
            total.add_(parameter.grad.view(total.shape))
            if clear_lp_grads:
                parameter.grad.zero_()
        parameter._hp_grad = total  # type: ignore[attr-defined]
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = update


@contextmanager
def patched_muon_check() -> Iterator[None]:
    """Context in which new engines accept Muon in bf16 under pipelines and on stacked matrices.

    The constructor of BF16_Optimizer (DeepSpeed 0.19.8) refuses both, although its kernels take the
    last two dimensions as the matrix and the others as a batch, and its norm covers all stages. So
    the optimizer's class is hidden from the constructor.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    original = BF16_Optimizer.__init__

    def init(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        kind = type(optimizer)
        optimizer.__class__ = torch.optim.Optimizer
        try:
            original(self, optimizer, *args, **kwargs)
        finally:
            optimizer.__class__ = kind
        self._uses_muon = isinstance(optimizer, MuonWithAuxAdam)

    BF16_Optimizer.__init__ = init
    try:
        yield
    finally:
        BF16_Optimizer.__init__ = original


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients)
    return torch.stack([n.float() for n in norms]).square().sum()


class FusedAdamW(torch.optim.AdamW):
    """torch's, whose methods do not import torch._dynamo: two seconds of each start.

    torch (2.13, optim/optimizer.py) imports it to keep these methods out of compiled code, and
    nothing here compiles an optimizer.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def _torch_adamw(groups: list[dict[str, Any]], common: dict[str, Any]) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if FusedAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # compared by type; others bring a warning
        ZERO_SUPPORTED_OPTIMIZERS.append(FusedAdamW)
    return FusedAdamW(groups, **common, fused=True)


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
    # apex on PyPI is a web toolkit; NVIDIA's is recognised by its modules.
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
    "te_adam": "Transformer Engine (pip install --no-build-isolation 'manyformer[fp8]') and CUDA",
    "apex_adam": "NVIDIA apex, built from its source (the apex on PyPI is another project)",
}


def _from(module: str, attribute: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a broken installation may raise any exception
        raise ConfigError(
            f"training.optimizer={name} needs {_NEEDS[name]} ({type(error).__name__}: {error}); "
            "install it or use training.optimizer=adamw"
        ) from error


def _muon(
    groups: list[dict[str, Any]],
    common: dict[str, Any],
    config: TrainingConfig,
    ctx: ParallelContext,
) -> torch.optim.Optimizer:
    """Muon for matrices, each expert separately, and AdamW for everything else.

    Every matrix is whole on its rank (RunConfig refuses muon with parallel.tensor > 1):
    orthogonalising a shard is another algorithm.
    """
    for group in groups:
        group["use_muon"] = group["optimizer"] == "muon"
        group.update({"lr": common["lr"]} if group["use_muon"] else common)
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    if ctx.device.type == "cpu" and not config.compile:
        from pretrain.engine.muon import BatchedMuon, disable_kernel_compilation

        disable_kernel_compilation()
        return BatchedMuon(groups)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(groups)
