"""Decoders whose layers compute only some tokens: mixture of depths, and surprise-based routing."""

from __future__ import annotations

from models.lazy_names import lazy_names

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
__getattr__ = lazy_names(__name__, _MODULES)
