"""The Daria-Former family. Names are imported when they are asked for, so that torch is not."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DariaFormerConfig": "config",
    "DariaFormerModel": "single",
    "DariaFormerForCausalLM": "hf_auto",
    "DariaFormerHFConfig": "hf_auto",
    "DariaGenerator": "generation",
    "Trainer": "training",
    "DariaFormerLoss": "training",
    "build_optimizer": "training",
    "MemoryIntegrationSystem": "memory_api",
    "ReactionVariabilitySystem": "variability",
    "FAMILY": "model",
    "LoRALinear": "adapters",
    "LoRAManager": "lora",
    "merged_state_dict": "lora_state",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
