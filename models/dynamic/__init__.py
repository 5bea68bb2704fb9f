"""Decoders whose layers compute only some tokens: mixture of depths, and surprise-based routing.

Names are imported lazily, so that the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "DTFConfig": "config",
    "MoDConfig": "config",
    "DTF": "model",
    "MOD": "model",
    "DTFDecisionLayer": "standalone_modules",
    "DTFDynamicLayer": "standalone_modules",
    "DTFRouter": "standalone_modules",
    "MoDLayer": "standalone_modules",
    "MoDRouter": "standalone_modules",
    "PriorFFN": "standalone_modules",
    "BaseDynamicCausalLM": "hf.auto",
    "DTFForCausalLM": "hf.auto",
    "DTFHFConfig": "hf.auto",
    "MoDForCausalLM": "hf.auto",
    "MoDHFConfig": "hf.auto",
    "ThresholdUpdates": "hf.auto",
    "model_classes": "hf.auto",
    "register": "hf.auto",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
