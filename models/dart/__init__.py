"""DART: a block diffusion stream and a causal stream in one model.

Names are imported lazily, so that the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "DARTConfig": "config",
    "FAMILY": "model",
    "DART": "standalone",
    "DARTGenerateOutput": "standalone",
    "DARTForCausalLM": "hf.auto",
    "DARTHFConfig": "hf.auto",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
