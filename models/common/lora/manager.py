"""LoRA manager: add, stack, switch, train and merge the adapters of a model.

    manager = LoRAManager(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])
    manager.inject()
    manager.freeze_base()
    manager.add_adapter("style", rank=8)
    manager.activate_adapter("style", weight=0.5)

A model with adapters has the parameters of the plain model and `*.lora.*`; `merged_state_dict`
converts its state dict to that of the plain model.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from models.common.lora.layers import PRIMARY, ComputedWeight, LoRALinear, LowRank, wrap
from models.common.lora.state import (
    SETTINGS,
    SETTINGS_KEY,
    nearest,
    read_settings,
    written_settings,
)
from parallel.random import initialize


class LoRAManager:
    """The adapters of `model`: the primary one, which is always on, and named ones.

    `rank`, `alpha` and `dropout` belong to the primary adapter; `targets` are last names of linear
    layers. A model built with adapters already has its primary one and must be given the same
    settings. `seed`: seed of the A matrices, which also depend on the layer's name. A family with
    computed adapter weights overrides `attach`, `detach` and `add_computed_weight`.

    Raises:
        ValueError: an unknown target, with the nearest known ones.
    """

    # Last names of the layers that a family lets adapt; empty: any linear layer of the model.
    known_targets: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        rank: int = 16,
        alpha: float = 32,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        dropout: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        known = self.known_targets or sorted(_last_names(model))
        for target in targets:
            if target not in known:
                raise ValueError(f"LoRA target {target!r} is unknown; {nearest(target, known)}")
        if not targets:
            raise ValueError(f"LoRA targets={list(targets)} is empty; name some of {known}")
        self.model, self.rank, self.alpha, self.dropout = model, rank, float(alpha), dropout
        self.targets, self.seed = tuple(targets), seed
        self._adapters: dict[str, dict[str, Any]] = {}  # name -> rank, alpha, weight (None: off)
        self._frozen: list[nn.Parameter] = []

    # Building.

    def inject(self) -> None:
        """Add the primary adapter to every target; the model's function does not change.

        Raises:
            ValueError: a target is in no layer, or the model was built with other adapters.
        """
        if hasattr(self.model, SETTINGS):
            raise ValueError("the model has a LoRAManager already; use that one, or strip() first")
        present = _last_names(self.model).intersection(self.known_targets or self.targets)
        for target in self.targets:
            if target not in present:
                known = nearest(target, present)
                raise ValueError(f"LoRA target {target!r} is in no layer of the model; {known}")
        for name, layer in self.named_layers():
            self._check_native(name, layer)
        new = wrap(self.model, self.targets, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        for name, layer in new:
            self.initialize(f"{name}.lora.{PRIMARY}", layer.lora[PRIMARY])
        self.attach()
        self.model.add_module(SETTINGS, _Settings(self))

    @classmethod
    def from_state_dict(cls, model: nn.Module, state: Mapping[str, Any]) -> Self:
        """Build the adapters that a state dict holds into a plain model, and load it.

        Raises:
            ValueError: it was not saved from a model with a manager.
        """
        if SETTINGS_KEY not in state:
            raise ValueError(
                f"the state dict has no {SETTINGS_KEY}; save that of a model with a LoRAManager"
            )
        values = read_settings(state[SETTINGS_KEY])
        names = ("rank", "alpha", "targets", "dropout", "seed")
        manager = cls(model, **{name: values[name] for name in names})
        manager.inject()
        for name, adapter in values["adapters"].items():
            manager.add_adapter(name, adapter["rank"], adapter["alpha"])
            for kind in adapter["follows"]:
                manager.add_computed_weight(name, kind)
        model.load_state_dict(state)
        return manager

    def strip(self) -> nn.Module:
        """Remove every adapter, added or built in, and return the model; what is merged stays."""
        self._injected()
        for name, layer in self.named_layers():
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, layer.unwrapped())
        self.detach()
        delattr(self.model, SETTINGS)
        return self.model

    # Named adapters.

    def add_adapter(self, name: str, rank: int | None = None, alpha: float | None = None) -> None:
        """Add an adapter that is not active yet; B is 0, so that it changes nothing until trained.

        By default it has the rank and the scale alpha / rank of the primary one.

        Raises:
            ValueError: the name is taken, or no identifier.
        """
        self._switchable()
        if not name.isidentifier() or name == PRIMARY or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"adapter name {name!r} must be a Python identifier other than {PRIMARY!r}; choose "
                "another name"
            )
        if name in self._adapters:
            raise ValueError(f"adapter {name!r} exists already; choose another name")
        rank = self.rank if rank is None else rank
        alpha = rank * self.alpha / self.rank if alpha is None else float(alpha)
        for path, layer in self.named_layers():
            adapter = LowRank(layer.weight, rank=rank, alpha=alpha).train(layer.training)
            layer.lora[name] = adapter
            self.initialize(f"{path}.lora.{name}", adapter)
        self._adapters[name] = {"rank": rank, "alpha": alpha, "weight": None, "follows": []}

    def activate_adapter(self, name: str, weight: float | str = 1.0) -> None:
        """Switch an adapter on, in addition to the active ones.

        `weight`: a number, or the name of a computed weight, one of `computed_weights`. An unknown
        adapter is added, with a warning.

        Raises:
            ValueError: a weight that is none of these.
        """
        self._switchable()
        if isinstance(weight, str) and weight not in self.computed_weights:
            known = nearest(weight, self.computed_weights)
            raise ValueError(f"adapter weight={weight!r} is unknown; {known}")
        if not isinstance(weight, str) and not math.isfinite(weight):
            raise ValueError(f"adapter weight={weight} is not finite; choose a number")
        self.check_computable(weight)
        if name not in self._adapters:
            self.add_adapter(name)
            others = ", ".join(other for other in self._adapters if other != name) or "none"
            warnings.warn(
                f"adapter {name!r} did not exist and was added: it changes nothing until it is "
                f"trained (other adapters: {others}); use add_adapter to choose its rank",
                stacklevel=2,
            )
        if isinstance(weight, str):
            self.add_computed_weight(name, weight)
        self.switch(name, weight)

    def deactivate_adapter(self, name: str) -> None:
        """Switch an adapter off; what it has learned stays.

        Raises:
            ValueError: there is no adapter of this name.
        """
        self._switchable()
        if name not in self._adapters:
            raise ValueError(f"adapter {name!r} does not exist; {nearest(name, self._adapters)}")
        self.switch(name, None)

    def deactivate_all_extras(self) -> None:
        """Switch every adapter but the primary one off."""
        for name in self._adapters:
            self.deactivate_adapter(name)

    @property
    def active(self) -> dict[str, float | str]:
        """The named adapters that are on, with their weights."""
        on = {name: a["weight"] for name, a in self._adapters.items()}
        return {name: weight for name, weight in on.items() if weight is not None}

    # Training.

    def lora_parameters(self) -> list[nn.Parameter]:
        """Every parameter of the adapters, active or not."""
        self._injected()
        return [p for name, p in self.model.named_parameters() if ".lora." in f".{name}"]

    def num_lora_parameters(self) -> int:
        """Elements of `lora_parameters`."""
        return sum(parameter.numel() for parameter in self.lora_parameters())

    def freeze_base(self) -> None:
        """Leave exactly the adapters trainable: every other parameter of the model is frozen."""
        own = set(map(id, self.lora_parameters()))
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._frozen += frozen

    def unfreeze_base(self) -> None:
        """Make trainable again what `freeze_base` froze."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()

    # Merging.

    def merge_all(self) -> None:
        """Add the primary and the active adapters to the weights, so that they cost nothing.

        A copy of the weights is kept for `unmerge_all`; `strip()` lets go of it.

        Raises:
            ValueError: they are merged already, or the weight of an active one is computed.
        """
        self._switchable()
        for _, layer in self.named_layers():
            layer.merge()

    def unmerge_all(self) -> None:
        """Give the weights back the bits they had before `merge_all`.

        Raises:
            ValueError: nothing is merged, or a merged weight was changed since.
        """
        self._injected()
        if not self._is_merged():
            raise ValueError("no adapters are merged; call merge_all() first")
        for _, layer in self.named_layers():
            layer.unmerge()

    # State.

    def settings(self) -> dict[str, Any]:
        """The settings that `from_state_dict` needs beside the tensors; JSON types."""
        self._switchable()
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "dropout": self.dropout,
            "seed": self.seed,
            "adapters": copy.deepcopy(self._adapters),
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Switch adapters to the state recorded in `settings`.

        Raises:
            ValueError: they are of other adapters.
        """
        self._switchable()
        for name, theirs in values["adapters"].items():
            ours = self._adapters.get(name)
            if ours is None or (ours["rank"], ours["alpha"]) != (theirs["rank"], theirs["alpha"]):
                raise ValueError(
                    f"adapter {name!r} of the state dict is not in the model with rank="
                    f"{theirs['rank']} and alpha={theirs['alpha']}; use LoRAManager.from_state_dict"
                )
            self.switch(name, theirs["weight"])

    # For families with computed weights. In stored settings their kinds are called "follows".

    @property
    def computed_weights(self) -> Mapping[str, ComputedWeight]:
        """The computed adapter weights of the family, by name."""
        return {}

    def attach(self) -> None:
        """Connect computed weights to the adapters, once all are built."""

    def detach(self) -> None:
        """Remove whatever `attach` added."""

    def check_computable(self, weight: float | str) -> None:
        """Raise ValueError if the model cannot compute the given weight."""

    def add_computed_weight(self, name: str, kind: str) -> None:
        """Create the learned parameters of a computed adapter weight; may be called again."""
        if kind not in self._adapters[name]["follows"]:
            self._adapters[name]["follows"].append(kind)

    def switch(self, name: str, weight: float | str | None) -> None:
        """Set the weight of an adapter in every layer; None switches it off."""
        self._adapters[name]["weight"] = weight
        for _, layer in self.named_layers():
            layer.active.pop(name, None)
            if weight is not None:
                layer.active[name] = (
                    self.computed_weights[weight] if isinstance(weight, str) else weight
                )

    def named_layers(self) -> Iterator[tuple[str, LoRALinear]]:
        """The adapted layers and their names."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, LoRALinear):
                yield name, module

    def initialize(self, name: str, module: nn.Module) -> None:
        """Draw the initial values of parameters whose names begin with `name`."""
        rank = next(layer for _, layer in self.named_layers()).ctx.tensor.rank
        initialize(module, seed=self.seed, prefix=name, tensor_rank=rank)

    def _check_native(self, name: str, layer: LoRALinear) -> None:
        primary: Any = layer.lora[PRIMARY]
        built = (primary.rank, primary.alpha, layer.dropout)
        if built != (self.rank, self.alpha, self.dropout):
            raise ValueError(
                f"{name} was built with LoRA rank, alpha and dropout {built}, the manager has "
                f"{(self.rank, self.alpha, self.dropout)}; give it those of the configuration"
            )

    def _injected(self) -> None:
        if getattr(getattr(self.model, SETTINGS, None), "manager", None) is not self:
            raise ValueError("the model does not have these adapters; call inject() first")

    def _is_merged(self) -> bool:
        return any(layer.is_merged for _, layer in self.named_layers())

    def _switchable(self) -> None:
        self._injected()
        if self._is_merged():
            raise ValueError("adapters are merged into the weights; call unmerge_all() or strip()")


class _Settings(nn.Module):
    """Carries the manager's settings in the state dict of the model."""

    def __init__(self, manager: LoRAManager) -> None:
        super().__init__()
        self.manager = manager

    def get_extra_state(self) -> Tensor:
        return written_settings(self.manager.settings())

    def set_extra_state(self, state: Tensor) -> None:
        self.manager.restore(read_settings(state))


def _last_names(model: nn.Module) -> set[str]:
    """Last names of the modules that hold a matrix."""
    named = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return {n.rpartition(".")[2] for n, w in named if isinstance(w, Tensor) and w.dim() == 2}
