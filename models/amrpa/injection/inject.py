"""AMRPA in a transformers model: injection, losses and measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from models.amrpa.config import AMRPAConfig
from models.amrpa.injection.architectures import (
    Architecture,
    Stack,
    architecture_of,
    attentions,
    check_routable,
    find,
)
from models.amrpa.injection.attention import IMPLEMENTATION, register
from models.amrpa.injection.freezing import freeze
from models.amrpa.injection.memories import Memories
from models.amrpa.injection.model import AMRPAState, injected_class
from models.amrpa.injection.state import Site, StackState, wrap_checkpointing
from models.amrpa.memory import QueryMemory
from models.amrpa.targets import MemoryPlan, plan_memory, targets_by_stack

Mode = Literal["auto", "encoder", "decoder"]

# Measurements that `get_amrpa_metrics` returns.
METRICS = (
    "gate_impact",
    "gate_variance",
    "alpha_diversity",
    "memory_contribution",
    "using_memory",
)


def inject_amrpa(
    model: Any,
    config: AMRPAConfig | None = None,
    mode: Mode = "auto",
    target_layers: str | Sequence[int] | None = None,
    adapter: Architecture | None = None,
) -> Any:
    """Inject AMRPA into the attention of a transformers model, in place, and return it.

    That is self-attention, and with `inject_cross_attention` that of a decoder to its encoder, too.

    The model computes the same logits, bit for bit, until it is trained. New parameters exist at
    once, in the dtype and on the device of the attention that they serve, under the name
    `...amrpa.<layer>`. In training, `outputs.loss` includes the two losses of AMRPA.

    `mode`: `encoder` or `decoder` restricts injection to one stack, `auto` takes all.
    `target_layers` replaces that of `config`. `adapter`: where a model that is not in
    `models.amrpa.injection.architectures` keeps its attention.

    Raises:
        ValueError: the model is injected already, its attention cannot be routed, or the targets
            name no layer with an earlier one.
    """
    config = _settings(config, target_layers)
    _check_model(model)
    architecture = adapter or architecture_of(model.config)
    check_routable(model.config, architecture)
    present = _present_stacks(model, architecture)
    stacks = _stacks_of(mode, present, type(model).__name__)
    found = {each.name: attentions(model.config, layers, each) for each, layers in stacks}
    plans = _plan(model.config, config, {name: len(each) for name, each in found.items()})
    if config.inject_cross_attention:
        crossing = _cross_attentions(model, stacks, plans)
        stacks += crossing
        for each, layers in crossing:
            found[each.name] = attentions(model.config, layers, each)
    states = []
    for stack, layers in stacks:
        if stack.name in plans:
            state = StackState(stack.name, config, plans[stack.name])
            _attach(model, stack, layers, found[stack.name], state)
            states.append(state)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    model.amrpa_state = AMRPAState(config, states)
    model_class: Any = type(model)
    model.__class__ = injected_class(model_class)
    model.config.amrpa_config = config.to_dict()
    model.config.amrpa_mode = mode
    parts = [*present, *(each for each in stacks if each not in present)]
    freeze(
        model, config, [(layers, found.get(s.name, []), plans.get(s.name)) for s, layers in parts]
    )
    return model


def _settings(config: AMRPAConfig | None, target_layers: Any) -> AMRPAConfig:
    """`config` with other `target_layers`, if any are given; the caller's is left alone."""
    if config is None:
        config = AMRPAConfig()
    if not isinstance(config, AMRPAConfig):
        raise ValueError(f"config={config!r} is no AMRPAConfig; use AMRPAConfig.from_dict")
    if target_layers is not None:
        listed = isinstance(target_layers, Iterable) and not isinstance(target_layers, str)
        chosen = list(target_layers) if listed else target_layers
        config = AMRPAConfig.from_dict(config.to_dict() | {"target_layers": chosen})
    try:
        torch.device(config.metric_device)
    except RuntimeError:
        raise ValueError(
            f"metric_device={config.metric_device!r} is no device of torch; use 'cpu' or 'cuda'"
        ) from None
    return config


def _check_model(model: Any) -> None:
    if isinstance(getattr(model, "amrpa_state", None), AMRPAState):
        raise ValueError(
            f"{type(model).__name__} has AMRPA already; inject into a model loaded anew"
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"model={type(model).__name__} is no PreTrainedModel of transformers; inject into one "
            "first, then wrap it or give it adapters"
        )


def get_amrpa_loss(model: Any) -> Tensor:
    """The weighted losses of the last forward pass, averaged over rows: a scalar with gradient.

    Raises:
        ValueError: the model has no AMRPA, or there was no forward pass.
    """
    loss: Tensor = _state(model).loss()
    return loss


def get_amrpa_metrics(model: Any) -> dict[str, Tensor]:
    """Measurements of the last forward pass on `metric_device`: name -> fp32 [b], means over
    layers, heads and tokens.

    `gate_impact`: mean G. `gate_variance`: variance of G over tokens. `alpha_diversity`: entropy of
    alpha. `memory_contribution`: norm of G W_m m. `using_memory`: the share of layers with memory
    that read a history.

    Raises:
        ValueError: the model has no AMRPA, track_metrics is False, or there was no forward pass.
    """
    state = _state(model)
    if not state.config.track_metrics:
        raise ValueError(
            "track_metrics=False keeps no measurements; inject with track_metrics=True"
        )
    return {name: state.metric(name).to(state.config.metric_device) for name in METRICS}


def reset_amrpa_history(model: Any) -> None:
    """Forget losses and measurements; history never outlives a forward pass.

    Raises:
        ValueError: the model has no AMRPA.
    """
    _state(model).measured = None


def _state(model: Any) -> AMRPAState:
    state = getattr(model, "amrpa_state", None)
    if not isinstance(state, AMRPAState):
        raise ValueError(f"{type(model).__name__} has no AMRPA; call inject_amrpa on it first")
    return state


def _base(model: Any) -> nn.Module:
    base: nn.Module = model.base_model
    return base


def _present_stacks(model: Any, architecture: Architecture) -> list[tuple[Stack, nn.Module]]:
    """The stacks that the model has, with their layers."""
    found = [(stack, find(_base(model), stack.layers)) for stack in architecture.stacks]
    present = [(stack, layers) for stack, layers in found if layers is not None]
    if not present:
        paths = ", ".join(repr(stack.layers) for stack in architecture.stacks)
        raise ValueError(
            f"layers={paths} of the adapter are no layers of {type(model).__name__}; give their "
            "path in its base model"
        )
    return present


def _stacks_of(
    mode: Mode, present: list[tuple[Stack, nn.Module]], model_name: str
) -> list[tuple[Stack, nn.Module]]:
    """The stacks that `mode` names."""
    if mode not in ("auto", "encoder", "decoder"):
        raise ValueError(f"mode={mode!r} is none of 'auto', 'encoder', 'decoder'; choose one")
    chosen = [(stack, layers) for stack, layers in present if mode in ("auto", stack.name)]
    if not chosen:
        raise ValueError(
            f"mode={mode!r}: {model_name} has the stacks "
            f"{', '.join(stack.name for stack, _ in present)} alone; choose another mode"
        )
    return chosen


def _cross_attentions(
    model: Any, stacks: list[tuple[Stack, nn.Module]], plans: dict[str, MemoryPlan]
) -> list[tuple[Stack, nn.Module]]:
    """The cross-attention of the stacks that have one, as stacks with a history of their own;
    `plans` gets theirs, which is that of the self-attention.

    Raises:
        ValueError: no stack with memory has one.
    """
    found = []
    for stack, layers in stacks:
        path = stack.cross_attention
        if path is not None and stack.name in plans:
            cross = replace(stack, name=f"{stack.name}_cross", attention=path, cross_attention=None)
            plans[cross.name] = plans[stack.name]
            found.append((cross, layers))
    if not found:
        raise ValueError(
            f"inject_cross_attention=True has no effect: {type(model).__name__} has no "
            "cross-attention in a stack with memory; leave it out or choose other target_layers"
        )
    return found


def _plan(config: Any, settings: AMRPAConfig, sizes: dict[str, int]) -> dict[str, MemoryPlan]:
    """The plan of every stack that has targets; `sizes`: name -> number of layers."""
    targets = targets_by_stack(settings.target_layers, sizes)
    return {
        name: plan_memory(layers, settings, _layer_types(config, sizes[name]))
        for name, layers in targets.items()
    }


def _layer_types(config: Any, num_layers: int) -> list[str]:
    types = getattr(config, "layer_types", None)
    return list(types) if types and len(types) == num_layers else ["full"] * num_layers


def _attach(
    model: Any, stack: Stack, layers: nn.Module, modules: list[nn.Module], state: StackState
) -> None:
    """Give every attention of a stack its site, and those of target layers their memory."""
    config = model.config
    num_heads = getattr(config, stack.num_heads, None)
    if num_heads is None:
        raise ValueError(
            f"num_heads={stack.num_heads!r} of the adapter is no setting of "
            f"{type(config).__name__}; name the one that holds the number of heads"
        )
    head_dim = getattr(config, stack.head_dim, None) or config.hidden_size // num_heads
    for module in dict.fromkeys(modules):
        depths = [depth for depth, each in enumerate(modules) if each is module]
        site = Site(state, depths)
        module.amrpa_site = site  # type: ignore[assignment]
        module.register_forward_pre_hook(site.take_rotation, with_kwargs=True)
        _add_memories(module, state.plan, depths, num_heads, head_dim, state.config)
    parent, _, _ = stack.layers.rpartition(".")
    owner = _base(model).get_submodule(parent)
    owner.register_forward_pre_hook(state.begin)
    owner.register_forward_hook(state.release)
    state.layers = [layers]
    wrap_checkpointing(layers, state)


def _add_memories(
    module: nn.Module,
    plan: MemoryPlan,
    depths: list[int],
    num_heads: int,
    head_dim: int,
    config: AMRPAConfig,
) -> None:
    like = next(p for p in module.parameters() if p.is_floating_point())
    memories: dict[int, QueryMemory] = {}
    for depth in depths:
        if depth in plan.reads:
            window, kind = len(plan.reads[depth]), config.granularity
            memory = QueryMemory(num_heads, head_dim, window, config, granularity=kind)
            memory.reset_parameters()
            memories[depth] = memory.to(like.device, like.dtype)
    if memories:
        module.amrpa = Memories(memories)
        module.amrpa.train(module.training)
