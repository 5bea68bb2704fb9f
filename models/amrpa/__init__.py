"""AMRPA: attention that reads the attention of earlier layers.

Names are imported lazily, so that the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "AMRPAConfig": "config",
    "AMRPALlamaConfig": "config",
    "AMRPALlamaForCausalLM": "hf.auto",
    "AMRPALlamaHFConfig": "hf.auto",
    "FAMILY": "model",
    "resolve_targets": "targets",
    "QueryMemory": "memory",
    "Architecture": "injection.architectures",
    "Stack": "injection.architectures",
    "inject_amrpa": "injection.inject",
    "get_amrpa_loss": "injection.inject",
    "get_amrpa_metrics": "injection.inject",
    "reset_amrpa_history": "injection.inject",
    "from_pretrained": "injection.inject",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
