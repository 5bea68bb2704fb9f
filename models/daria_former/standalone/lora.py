"""Adapters of a whole model: built in, added, stacked, switched, trained alone, merged.

    manager = LoRAManager(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])
    manager.inject()
    manager.freeze_base()
    manager.add_adapter("persona_style", rank=8)
    manager.activate_adapter("persona_style")

Works on any nn.Module that holds the layers of a Daria-Former. The weights of a model with adapters
are those of the model and `*.lora.*`; `merged_state_dict` makes one of the other.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.daria_former.adapters import (
    FOLLOWED,
    PRIMARY,
    BlockAdapters,
    LoRALinear,
    LowRank,
    named_targets,
    wrap,
)
from models.daria_former.config import LORA_TARGETS
from models.daria_former.layers import DACBlock, DariaEmbedding
from models.daria_former.standalone.lora_state import (
    SETTINGS,
    SETTINGS_KEY,
    merged_state_dict,
    nearest,
    read_settings,
    written_settings,
)
from parallel.random import initialize

__all__ = ["LoRALinear", "LoRAManager", "merged_state_dict"]


class LoRAManager:
    """The adapters of `model`: the primary one, which is always on, and named ones.

    `rank`, `alpha` and `dropout` are those of the primary adapter; `targets` are last names of
    linear layers (models.daria_former.config.LORA_TARGETS), each in every block and, for k_proj and
    v_proj, in every path. A model built with `lora_rank` has its primary adapter already and is
    given the same settings. `seed`: of the A matrices, which also depend on the layer's name.

    Raises:
        ValueError: an unknown target, with the nearest known ones.
    """

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
        for target in targets:
            if target not in LORA_TARGETS:
                known = nearest(target, LORA_TARGETS)
                raise ValueError(f"LoRA target {target!r} is unknown; {known}")
        if not targets:
            raise ValueError(f"LoRA targets={list(targets)} is empty; name some of {LORA_TARGETS}")
        self.model, self.rank, self.alpha, self.dropout = model, rank, float(alpha), dropout
        self.targets, self.seed = tuple(targets), seed
        self._adapters: dict[str, dict[str, Any]] = {}  # name -> rank, alpha, weight (None: off)
        self._frozen: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        self._personas: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    # Building.

    def inject(self) -> None:
        """Put the primary adapter around every target; the model computes what it did.

        Raises:
            ValueError: a target is in no layer, or the model was built with other adapters.
        """
        if hasattr(self.model, SETTINGS):
            raise ValueError("the model has a LoRAManager already; use that one, or strip() first")
        present = {t.name.rpartition(".")[2] for t in named_targets(self.model, LORA_TARGETS)}
        for target in self.targets:
            if target not in present:
                known = nearest(target, present)
                raise ValueError(f"LoRA target {target!r} is in no layer of the model; {known}")
        for name, layer in self._named_layers():
            self._check_native(name, layer)
        new = wrap(self.model, self.targets, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        for name, layer in new:
            self._initialize(f"{name}.lora.{PRIMARY}", layer.lora[PRIMARY])
        for _, block in self._blocks():
            if block.lora is None:
                block.lora = BlockAdapters(block)
            block.lora.bind(block)
        for module in list(self.model.modules()):
            if isinstance(module, DariaEmbedding) and hasattr(module, "persona"):
                self._hooks.append(module.register_forward_pre_hook(self._watch_persona))
        self.model.add_module(SETTINGS, _Settings(self))

    @classmethod
    def from_state_dict(cls, model: nn.Module, state: Mapping[str, Any]) -> LoRAManager:
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
                manager._learn_to_follow(name, kind)
        model.load_state_dict(state)
        return manager

    def strip(self) -> nn.Module:
        """Remove every adapter, added or built in, and return the model; what is merged stays."""
        self._injected()
        for name, layer in self._named_layers():
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, layer.unwrapped())
        for _, block in self._blocks():
            block.lora.detach()
            block.lora = None
        for hook in self._hooks:
            hook.remove()
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
            raise ValueError(f"adapter name {name!r} must be an identifier and not {PRIMARY!r}")
        if name in self._adapters:
            raise ValueError(f"adapter {name!r} exists already; choose another name")
        rank = self.rank if rank is None else rank
        alpha = rank * self.alpha / self.rank if alpha is None else float(alpha)
        for path, layer in self._named_layers():
            adapter = LowRank(layer.weight, rank=rank, alpha=alpha).train(layer.training)
            layer.lora[name] = adapter
            self._initialize(f"{path}.lora.{name}", adapter)
        self._adapters[name] = {"rank": rank, "alpha": alpha, "weight": None, "follows": []}

    def activate_adapter(self, name: str, weight: float | str = 1.0) -> None:
        """Switch an adapter on, beside those that are.

        `weight`: a number; "esv" for `clamp(kappa . e_t, 0, 1)` of every token's emotion state e_t
        (Emotion-LoRA); "persona" for `sigmoid(kappa . p)` of the persona p (Persona-LoRA). kappa is
        learned. An unknown adapter is added, with a warning.

        Raises:
            ValueError: a weight that is none of these.
        """
        self._switchable()
        kind = self._checked_weight(weight)
        if name not in self._adapters:
            self.add_adapter(name)
            others = nearest(name, [other for other in self._adapters if other != name])
            warnings.warn(
                f"adapter {name!r} did not exist and was added: it changes nothing until it is "
                f"trained; use add_adapter to choose its rank; {others}",
                stacklevel=2,
            )
        if kind is not None:
            self._learn_to_follow(name, kind)
        self._set(name, weight)

    def deactivate_adapter(self, name: str) -> None:
        """Switch an adapter off; what it has learned stays.

        Raises:
            ValueError: there is none of this name, with the nearest ones.
        """
        self._switchable()
        if name not in self._adapters:
            raise ValueError(f"adapter {name!r} does not exist; {nearest(name, self._adapters)}")
        self._set(name, None)

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
        """Every A, B and kappa, of active adapters and of others."""
        self._injected()
        owners = [layer.lora for _, layer in self._named_layers()]
        owners += [block.lora for _, block in self._blocks()]
        return [parameter for owner in owners for parameter in owner.parameters()]

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
            ValueError: they are merged already, or an active one follows a state.
        """
        self._switchable()
        for _, layer in self._named_layers():
            layer.merge()

    def unmerge_all(self) -> None:
        """Give the weights back the bits they had before `merge_all`.

        Raises:
            ValueError: nothing is merged, or a merged weight was changed since.
        """
        self._injected()
        if not self._is_merged():
            raise ValueError("no adapters are merged; call merge_all() first")
        for _, layer in self._named_layers():
            layer.unmerge()

    # State.

    def settings(self) -> dict[str, Any]:
        """What `from_state_dict` needs beside the tensors; JSON types."""
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
        """Switch adapters as `settings` of the same adapters says.

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
            self._set(name, theirs["weight"])

    # Inside.

    def _named_layers(self) -> Iterator[tuple[str, LoRALinear]]:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, LoRALinear):
                yield name, module

    def _blocks(self) -> Iterator[tuple[str, Any]]:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, DACBlock):
                yield name, module

    def _initialize(self, name: str, module: nn.Module) -> None:
        rank = next(layer for _, layer in self._named_layers()).ctx.tensor.rank
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
        return any(layer.is_merged for _, layer in self._named_layers())

    def _switchable(self) -> None:
        self._injected()
        if self._is_merged():
            raise ValueError("adapters are merged into the weights; call unmerge_all() or strip()")

    def _set(self, name: str, weight: float | str | None) -> None:
        self._adapters[name]["weight"] = weight
        for _, layer in self._named_layers():
            layer.active.pop(name, None)
            if weight is not None:
                layer.active[name] = weight
        for _, block in self._blocks():
            block.lora.following.pop(name, None)
            if isinstance(weight, str):
                block.lora.following[name] = weight

    def _checked_weight(self, weight: float | str) -> str | None:
        """What a weight follows; None for a number."""
        if not isinstance(weight, str):
            if not math.isfinite(weight):
                raise ValueError(f"adapter weight={weight} is not finite; choose a number")
            return None
        if weight not in FOLLOWED:
            raise ValueError(f"adapter weight={weight!r} is unknown; {nearest(weight, FOLLOWED)}")
        if not any(True for _ in self._blocks()):
            raise ValueError(f"adapter weight={weight!r} needs the blocks of a Daria-Former")
        if weight == "persona" and not self._hooks:
            raise ValueError("adapter weight='persona' needs a model with the persona path")
        return weight

    def _learn_to_follow(self, name: str, kind: str) -> None:
        for path, block in self._blocks():
            kappa = block.lora.learn_to_follow(name, kind, like=block.attention.q_proj.weight)
            if kappa is not None:
                holder = nn.ParameterDict({name: kappa})
                self._initialize(f"{path}.lora.{kind}", holder)
        if kind not in self._adapters[name]["follows"]:
            self._adapters[name]["follows"].append(kind)

    def _watch_persona(self, embedding: Any, args: tuple[Any, ...]) -> None:
        """Let the blocks know the persona of every call, of a generation that of its first one."""
        given = getattr(args[0], "persona", None)
        persona = embedding.persona.unsqueeze(0) if given is None else given
        if len(args) > 1 and args[1] is not None:
            persona = self._personas.setdefault(args[1], persona)
        for _, block in self._blocks():
            block.lora.given_persona = persona


class _Settings(nn.Module):
    """Carries the manager's settings in the state dict of the model."""

    def __init__(self, manager: LoRAManager) -> None:
        super().__init__()
        self.manager = manager

    def get_extra_state(self) -> Tensor:
        return written_settings(self.manager.settings())

    def set_extra_state(self, state: Tensor) -> None:
        self.manager.restore(read_settings(state))
