"""Low-rank adapters, several at once, switched while the model runs.

    y = W x + sum over active n of  weight_n * alpha_n / r_n * B_n A_n x

A linear layer holds its adapters as a child (`q_proj.lora`), so the names of the weights they adapt
do not change. A starts uniform in +-1/sqrt(in) and B at 0: a new adapter changes nothing. Source:
arXiv 2106.09685. With `lora_rank` in the configuration every layer is built with the adapter
`default`, which trains at any layout: ranks share B of a column-parallel layer as they share W, and
A of a row-parallel one; the other matrix is whole, and each rank has a part of its gradient.

A weight is a number, or a function of the state: "esv", `sigmoid(kappa . e_t)` of each token's
emotion state, or "persona", `sigmoid(kappa . p)` of the row's persona; kappa is learned.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.daria_former.config import LORA_TARGETS, DariaFormerConfig
from parallel.layers import ShardedLinear
from parallel.random import initialize
from parallel.sharding import Constant, Sharding, declare, sharding_of

DEFAULT = "default"
CONDITIONS = ("esv", "persona")


class LoRACondition:
    """What conditioned adapters look at: the first layer and the blocks keep it up to date."""

    def __init__(self) -> None:
        self.emotion: Tensor | None = None  # fp32 [s, b, E]
        self.persona: Tensor | None = None  # [b or 1, persona_dim]

    def value(self, kind: str) -> Tensor:
        """[s, b, E] or [1, b, persona_dim].

        Raises:
            ValueError: the model has nothing of the kind.
        """
        found = self.emotion if kind == "esv" else self.persona
        if found is None:
            raise ValueError(f"an adapter has weight={kind!r}, and the model was given no {kind}")
        return found if kind == "esv" else found.unsqueeze(0)


class LoRAAdapter(nn.Module):
    """A [r, in] and B [out, r] of one adapter of one linear layer, as this tensor rank holds it."""

    def __init__(
        self, linear: ShardedLinear, *, rank: int, alpha: float, condition_size: dict[str, int]
    ) -> None:
        super().__init__()
        sharding = sharding_of("weight", linear.get_parameter("weight"))
        weight, size = linear.weight, linear.ctx.tensor.size
        whole = Sharding(partial_gradient=size > 1)
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_empty(weight.shape[0], rank))
        column = sharding.dim == 0
        declare(self.a, whole if column else Sharding(1, sharding.extent), _uniform)
        declare(self.b, Sharding(0, sharding.extent) if column else whole, Constant(0.0))
        for kind, width in condition_size.items():
            kappa = nn.Parameter(weight.new_empty(width))
            self.register_parameter(f"kappa_{kind}", declare(kappa, whole, Constant(0.0)))

    def delta(self) -> Tensor:
        """What the adapter adds to W at weight 1."""
        return self.scale * (self.b @ self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.a), self.b)


class LoRAAdapters(nn.Module):
    """All adapters of one linear layer, and how much each counts."""

    def __init__(self, *, dropout: float = 0.0, condition: LoRACondition | None = None) -> None:
        super().__init__()
        self.dropout = dropout
        self.condition = condition or LoRACondition()
        self.adapters = nn.ModuleDict()
        self.weights: dict[str, float | str] = {}  # of the active ones

    def forward(self, x: Tensor, *, has_tokens: bool = True) -> Tensor:
        """The sum of what the active adapters add to `W x`.

        Without tokens (slots of memory) a conditioned adapter adds nothing.
        """
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        total = x.new_zeros(())
        for name, weight in self.weights.items():
            if isinstance(weight, str):
                if not has_tokens:
                    continue
                kappa = self.adapters[name].get_parameter(f"kappa_{weight}")
                logit = (self.condition.value(weight).to(x.dtype) * kappa).sum(-1, keepdim=True)
                total = total + logit.sigmoid() * self.adapters[name](x)
            else:
                total = total + weight * self.adapters[name](x)
        return total


def add_adapter(
    linear: ShardedLinear,
    name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    condition: LoRACondition | None = None,
    condition_size: dict[str, int] | None = None,
) -> LoRAAdapter:
    """Give a linear layer one more adapter, not active yet; its values are not drawn.

    Raises:
        ValueError: dropout where tensor ranks share the layer: each would drop other inputs.
    """
    if dropout and linear.ctx.tensor.size > 1:
        raise ValueError(
            f"lora_dropout={dropout} with parallel.tensor={linear.ctx.tensor.size}: tensor ranks "
            "would drop different inputs; set lora_dropout to 0 or parallel.tensor to 1"
        )
    if linear.lora is None:
        linear.lora = LoRAAdapters(dropout=dropout, condition=condition)
    adapter = LoRAAdapter(linear, rank=rank, alpha=alpha, condition_size=condition_size or {})
    linear.lora.adapters[name] = adapter
    return adapter


def build_native_adapters(module: nn.Module, config: DariaFormerConfig) -> None:
    """Add the adapter `default` of a configuration with `lora_rank` to a block's targets.

    Raises:
        ValueError: FP8, whose linear layers take no adapters.
    """
    found = False
    for _, linear in target_layers(module, config.lora_targets):
        options = {"rank": config.lora_rank, "alpha": config.lora_alpha}
        add_adapter(linear, DEFAULT, dropout=config.lora_dropout, **options)  # type: ignore[arg-type]
        linear.lora.weights[DEFAULT] = 1.0
        found = True
    if not found:
        raise ValueError(
            f"lora_rank={config.lora_rank}: no layer takes adapters (those of precision=fp8 do "
            "not); set lora_rank=0 or precision=bf16"
        )


def target_layers(module: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, ShardedLinear]]:
    """Name and layer of every linear layer whose last name is one of `targets`."""
    for name, layer in module.named_modules():
        if isinstance(layer, ShardedLinear) and name.rpartition(".")[2] in targets:
            yield name, layer


class LoRAManager:
    """Adapters of a whole model in one process: added, stacked, switched, merged.

    `inject` adds and activates the adapter `default`. The published interface.

    Raises:
        ValueError: a target that is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
            down_proj.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 16,
        alpha: float = 32,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        dropout: float = 0.0,
    ) -> None:
        for target in targets:
            if target not in LORA_TARGETS:
                raise ValueError(f"target {target!r} is {_nearest(target, LORA_TARGETS)}")
        if rank < 1:
            raise ValueError(f"rank={rank} must be 1 or more")
        self.model, self.rank, self.alpha, self.dropout = model, rank, alpha, dropout
        self.layers = dict(target_layers(model, targets))
        self.condition = LoRACondition()
        self._merged: dict[str, float | str] | None = None

    def inject(self) -> None:
        """Add the adapter `default` to every target and activate it."""
        self.add_adapter(DEFAULT)
        self.activate_adapter(DEFAULT)
        for module in self.model.modules():
            if hasattr(module, "condition") and not isinstance(module, LoRAAdapters):
                module.condition = self.condition  # type: ignore[assignment]

    def add_adapter(self, name: str, rank: int | None = None, alpha: float | None = None) -> None:
        """Add an adapter that changes nothing yet, to be trained or loaded.

        Raises:
            ValueError: it exists already.
        """
        if name in self.names():
            raise ValueError(
                f"adapter {name!r} exists already; activate it, or choose another name"
            )
        sizes = self._condition_sizes()
        for path, linear in self.layers.items():
            adapter = add_adapter(
                linear,
                name,
                rank=rank or self.rank,
                alpha=self.alpha if alpha is None else alpha,
                dropout=self.dropout,
                condition=self.condition,
                condition_size=sizes,
            )
            seed, ctx = torch.initial_seed() % (1 << 31), linear.ctx
            initialize(adapter, seed=seed, prefix=f"{path}.{name}", tensor_rank=ctx.tensor.rank)

    def activate_adapter(self, name: str, weight: float | str = 1.0) -> None:
        """Let an adapter count with `weight`: a number, "esv" or "persona".

        One that does not exist is added: it changes nothing before it is trained, which a warning
        says.

        Raises:
            ValueError: another weight, or weights are merged.
        """
        if isinstance(weight, str) and weight not in CONDITIONS:
            raise ValueError(f"weight={weight!r} is {_nearest(weight, CONDITIONS)}, or a number")
        self._refuse_merged()
        if name not in self.names():
            warnings.warn(f"adapter {name!r} is new and changes nothing yet", stacklevel=2)
            self.add_adapter(name)
        for linear in self.layers.values():
            linear.lora.weights[name] = weight

    def deactivate_adapter(self, name: str) -> None:
        """Let an adapter not count, and keep it.

        Raises:
            ValueError: there is no such adapter, or weights are merged.
        """
        self._refuse_merged()
        if name not in self.names():
            raise ValueError(f"adapter {name!r} is {_nearest(name, self.names())}")
        for linear in self.layers.values():
            linear.lora.weights.pop(name, None)

    def deactivate_all_extras(self) -> None:
        """Deactivate every adapter but `default`."""
        for name in self.names():
            if name != DEFAULT:
                self.deactivate_adapter(name)

    def names(self) -> list[str]:
        """All adapters, active or not."""
        first = next(iter(self.layers.values()))
        return [] if first.lora is None else list(first.lora.adapters)

    def freeze_base(self) -> None:
        """Train the adapters alone."""
        adapters = {id(parameter) for parameter in self.lora_parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in adapters)

    def unfreeze_base(self) -> None:
        """Train everything."""
        self.model.requires_grad_(True)

    def lora_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all adapters."""
        for linear in self.layers.values():
            if linear.lora is not None:
                yield from linear.lora.parameters()

    def num_lora_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.lora_parameters())

    @torch.no_grad()
    def merge_all(self) -> None:
        """Add the active adapters to the weights, so that they cost nothing.

        Raises:
            ValueError: a conditioned adapter is active, or they are merged already.
        """
        self._refuse_merged()
        weights = dict(next(iter(self.layers.values())).lora.weights)
        for linear in self.layers.values():
            linear.weight += merged_delta(linear)
            linear.lora.weights.clear()
        self._merged = weights

    @torch.no_grad()
    def unmerge_all(self) -> None:
        """Take them out again; weights are what they were up to rounding.

        Raises:
            ValueError: nothing is merged.
        """
        if self._merged is None:
            raise ValueError("nothing is merged; call merge_all first")
        for linear in self.layers.values():
            linear.lora.weights.update(self._merged)
            linear.weight -= merged_delta(linear)
        self._merged = None

    def _refuse_merged(self) -> None:
        if self._merged is not None:
            raise ValueError("the adapters are merged; call unmerge_all first")

    def _condition_sizes(self) -> dict[str, int]:
        config = next(m.config for m in self.model.modules() if hasattr(m, "config"))
        assert isinstance(config, DariaFormerConfig)
        return {"esv": config.emotion_dim, "persona": config.persona_dim}


def merged_delta(linear: ShardedLinear) -> Tensor:
    """What the active adapters add to a layer's weight.

    Raises:
        ValueError: one of them depends on the state.
    """
    total = torch.zeros_like(linear.weight)
    for name, weight in linear.lora.weights.items():
        if isinstance(weight, str):
            raise ValueError(
                f"adapter {name!r} has weight={weight!r}, which changes with the text and cannot "
                "be merged; deactivate it or give it a number"
            )
        total += weight * linear.lora.adapters[name].delta()
    return total


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without adapters that computes what `model` does with its active ones.

    Raises:
        ValueError: an active adapter depends on the state.
    """
    state = {k: v for k, v in model.state_dict().items() if ".lora." not in k}
    for name, layer in model.named_modules():
        if isinstance(layer, ShardedLinear) and layer.lora is not None:
            state[f"{name}.weight"] = layer.weight + merged_delta(layer)
    return state


def _uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _nearest(name: str, known: Sequence[Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"not known; {hint}"
