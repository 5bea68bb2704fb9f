"""DART: a block diffusion stream and a causal stream in one model."""

from __future__ import annotations

from models.lazy_names import lazy_names

_MODULES = {
    "DARTConfig": "config",
    "FAMILY": "model",
    "DART": "standalone",
    "DARTGenerateOutput": "standalone",
    "DARTForCausalLM": "hf.auto",
    "DARTHFConfig": "hf.auto",
}

__all__ = list(_MODULES)
__getattr__ = lazy_names(__name__, _MODULES)
