"""Models of both families, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from models.dynamic.hf.config_dtf import DTFHFConfig
from models.dynamic.hf.config_mod import MoDHFConfig
from models.dynamic.hf.modeling import BaseDynamicCausalLM, ThresholdUpdates
from models.dynamic.hf.modeling_dtf import DTFForCausalLM
from models.dynamic.hf.modeling_mod import MoDForCausalLM
from models.hf.auto import model_classes, register

__all__ = [
    "BaseDynamicCausalLM",
    "DTFForCausalLM",
    "DTFHFConfig",
    "MoDForCausalLM",
    "MoDHFConfig",
    "ThresholdUpdates",
    "model_classes",
    "register",
]

register(DTFForCausalLM)
register(MoDForCausalLM)
