"""The Daria-Former family. Names are imported lazily, so that the package does not import torch."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "DariaFormerConfig": "config",
    "DariaFormerModel": "standalone.model",
    "DariaFormerForCausalLM": "hf.auto",
    "DariaFormerHFConfig": "hf.auto",
    "DariaGenerator": "standalone.generation",
    "Trainer": "standalone.training",
    "DariaFormerLoss": "standalone.training",
    "build_optimizer": "standalone.training",
    "MemoryIntegrationSystem": "standalone.memory_api",
    "ReactionVariabilitySystem": "standalone.logits_processor",
    "FAMILY": "model",
    "LoRALinear": "adapters",
    "LoRAManager": "standalone.lora",
    "merged_state_dict": "standalone.lora_state",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
