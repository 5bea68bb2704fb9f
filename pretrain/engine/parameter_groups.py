"""Parameter groups: optimizer, weight decay and learning rate of each parameter.

They depend only on the parameter's name in checkpoints and the role it declares where it is
created, which are the same on every rank and at every layout. The copies of a tied matrix on
several pipeline stages therefore train alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from parallel.carry import canonical_names
from parallel.sharding import role_of
from pretrain.config import TrainingConfig
from pretrain.engine.deepspeed_moe import is_shared_by_expert_ranks
from pretrain.errors import ConfigError

_MAX_LISTED = 8  # kinds of parameters printed per group


class Treatment(NamedTuple):
    """Optimizer, decay and learning-rate factor of a parameter."""

    optimizer: Literal["adamw", "muon"]
    weight_decay: float
    lr_multiplier: float


def treatment_of(name: str, parameter: nn.Parameter, training: TrainingConfig) -> Treatment:
    """The treatment of a parameter, by its canonical name and its role.

    A learning-rate multiplier applies to every parameter whose name contains its key; the longest
    matching key wins. Vectors do not decay. Under `training.optimizer=muon` matrices are
    trained by Muon, everything else by AdamW.

    Raises:
        ValueError: the parameter declares no role.
    """
    role = role_of(name, parameter)
    multipliers = training.lr_multipliers
    keys = sorted((key for key in multipliers if key in name), key=len)
    return Treatment(
        optimizer="muon" if training.optimizer == "muon" and role == "matrix" else "adamw",
        weight_decay=0.0 if role == "vector" else training.weight_decay,
        lr_multiplier=multipliers[keys[-1]] if keys else 1.0,
    )


def parameter_groups(
    module: nn.Module, training: TrainingConfig, *, expert_group: str = ""
) -> list[dict[str, Any]]:
    """Trainable parameters of `module`, in groups of equal treatment and in a fixed order.

    Expert-parallel parameters have groups of their own, with the keys that DeepSpeed looks for and
    `expert_group` as their name.

    Args:
        module: has `specs`, the layers that declare tied parameters.
    """
    names = canonical_names(module.specs)  # type: ignore[arg-type]
    groups: dict[tuple[bool, Treatment], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            treatment = treatment_of(names.get(name, name), parameter, training)
            key = (is_shared_by_expert_ranks(parameter), treatment)
            groups.setdefault(key, []).append(parameter)
    marks = {"moe": True, "name": expert_group}
    return [
        {"params": groups[is_expert, treatment], **treatment._asdict()}
        | (marks if is_expert else {})
        for is_expert, treatment in sorted(groups)
    ]


def check_multipliers(model: nn.Module, lr_multipliers: Mapping[str, float]) -> None:
    """Refuse a multiplier that would have no effect. `model`: the whole model, with its `specs`.

    Raises:
        ConfigError: a key matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    tied = canonical_names(model.specs)  # type: ignore[arg-type]
    for key in lr_multipliers:
        if any(key in name for name in names):
            continue
        other = next((target for name, target in tied.items() if key in name), None)
        if other is not None:
            raise ConfigError(
                f"training.lr_multipliers.{key}: the parameter of that name is tied to {other} and "
                "goes by that name; use a part of it"
            )
        raise ConfigError(
            f"training.lr_multipliers.{key}: no parameter name contains {key!r}; "
            f"names look like {', '.join(names[:3])}"
        )


def describe_groups(model: nn.Module, training: TrainingConfig) -> str:
    """One line per group: its treatment and its parameters, listed once for all layers.

    `model`: the whole model on the meta device.
    """
    groups: dict[Treatment, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds = groups.setdefault(treatment_of(name, parameter, training), {})
            kind = re.sub(r"\d+", "*", name)
            kinds[kind] = kinds.get(kind, 0) + parameter.numel()
    return "\n".join(_line(treatment, kinds) for treatment, kinds in sorted(groups.items()))


def _line(treatment: Treatment, kinds: Mapping[str, int]) -> str:
    rate = f", lr x {treatment.lr_multiplier:g}" if treatment.lr_multiplier != 1.0 else ""
    more = f" and {len(kinds) - _MAX_LISTED} more" if len(kinds) > _MAX_LISTED else ""
    return (
        f"trained by {treatment.optimizer}, weight decay {treatment.weight_decay:g}{rate}: "
        f"{sum(kinds.values()):,} parameters, {', '.join(list(kinds)[:_MAX_LISTED])}{more}"
    )
