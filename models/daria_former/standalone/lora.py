"""`LoRAManager` of a Daria-Former, with weights computed from the emotion state or the persona."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from models.common.lora import manager
from models.common.lora.layers import ComputedWeight, LoRALinear
from models.common.lora.state import merged_state_dict
from models.daria_former.adapters import COMPUTED_WEIGHTS, BlockAdapters
from models.daria_former.config import LORA_TARGETS
from models.daria_former.layers import DACBlock, DariaEmbedding

__all__ = ["LoRALinear", "LoRAManager", "merged_state_dict"]


class LoRAManager(manager.LoRAManager):
    """Adapters of any module that holds the layers of a Daria-Former.

    Each target is adapted in every block and, for k_proj and v_proj, in every path. The weight of
    an adapter is a number; "esv": `clamp(kappa . e_t, 0, 1)` of every token's emotion state e_t
    (Emotion-LoRA); or "persona": `sigmoid(kappa . p)` of the persona p (Persona-LoRA). kappa is
    learned, one per adapter and block.
    """

    known_targets = LORA_TARGETS

    @property
    def computed_weights(self) -> Mapping[str, ComputedWeight]:
        return COMPUTED_WEIGHTS

    def attach(self) -> None:
        self._hooks: list[Any] = []
        self._personas: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        for _, block in self._blocks():
            if block.lora is None:
                block.lora = BlockAdapters(block)
            block.lora.share_conditions(block)
        for module in list(self.model.modules()):
            if isinstance(module, DariaEmbedding) and hasattr(module, "persona"):
                self._hooks.append(module.register_forward_pre_hook(self._pass_persona))

    def detach(self) -> None:
        for _, block in self._blocks():
            block.lora.remove_hooks()
            block.lora = None
        for hook in self._hooks:
            hook.remove()

    def check_computable(self, weight: float | str) -> None:
        if isinstance(weight, str) and not any(True for _ in self._blocks()):
            raise ValueError(
                f"adapter weight={weight!r} is computed by the blocks of a Daria-Former, and this "
                "model has none; give a number"
            )
        if weight == "persona" and not self._hooks:
            raise ValueError(
                "adapter weight='persona' needs a model with the persona path; add persona to "
                "paths, or give a number"
            )

    def add_computed_weight(self, name: str, kind: str) -> None:
        for path, block in self._blocks():
            kappa = block.lora.add_kappa(name, kind, like=block.attention.q_proj.weight)
            if kappa is not None:
                self.initialize(f"{path}.lora.{kind}", nn.ParameterDict({name: kappa}))
        super().add_computed_weight(name, kind)

    def switch(self, name: str, weight: float | str | None) -> None:
        super().switch(name, weight)
        for _, block in self._blocks():
            block.lora.computed.pop(name, None)
            if isinstance(weight, str):
                block.lora.computed[name] = weight

    def _blocks(self) -> Iterator[tuple[str, Any]]:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, DACBlock):
                yield name, module

    def _pass_persona(self, embedding: Any, args: tuple[Any, ...]) -> None:
        """Pass the persona of a call to the blocks; in a generation, that of its first call."""
        given = getattr(args[0], "persona", None)
        persona = embedding.persona.unsqueeze(0) if given is None else given
        if len(args) > 1 and args[1] is not None:
            persona = self._personas.setdefault(args[1], persona)
        for _, block in self._blocks():
            block.lora.given_persona = persona
