"""The Daria-Former family. Names are imported lazily, so that the package does not import torch."""

from __future__ import annotations

from models.lazy_names import lazy_names

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
    "LoRALinear": "standalone.lora",
    "LoRAManager": "standalone.lora",
    "merged_state_dict": "standalone.lora",
}

__all__ = list(_MODULES)
__getattr__ = lazy_names(__name__, _MODULES)
