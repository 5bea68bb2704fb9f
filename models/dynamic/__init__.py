"""Decoders whose layers compute only some tokens: mixture of depths, and surprise-based routing.

Names are imported when they are asked for, so that torch is not.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DTFConfig": "config",
    "MoDConfig": "config",
    "DTF": "model",
    "MOD": "model",
    "DTFDecisionLayer": "modules",
    "DTFDynamicLayer": "modules",
    "DTFRouter": "modules",
    "MoDLayer": "modules",
    "MoDRouter": "modules",
    "PriorFFN": "modules",
    "BaseDynamicCausalLM": "hf_auto",
    "DTFForCausalLM": "hf_auto",
    "DTFHFConfig": "hf_auto",
    "MoDForCausalLM": "hf_auto",
    "MoDHFConfig": "hf_auto",
    "ThresholdUpdates": "hf_auto",
    "model_classes": "hf_auto",
    "register": "hf_auto",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
