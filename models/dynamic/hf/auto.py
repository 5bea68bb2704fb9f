"""Models of both families, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from models.dynamic.hf.config_dtf import DTFHFConfig
from models.dynamic.hf.config_mod import MoDHFConfig
from models.dynamic.hf.modeling import BaseDynamicCausalLM, ThresholdUpdates
from models.dynamic.hf.modeling_dtf import DTFForCausalLM
from models.dynamic.hf.modeling_mod import MoDForCausalLM

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

# `model_type` -> class; `register` adds others.
model_classes: dict[str, type[BaseDynamicCausalLM]] = {}


def register(model: type[BaseDynamicCausalLM]) -> type[BaseDynamicCausalLM]:
    """Add a model to `model_classes` and to transformers' Auto classes; also as a decorator.

    Raises:
        ValueError: its configuration has no name, or one that another model has.
    """
    name = model.config_class.model_type
    if not name or name in model_classes:
        raise ValueError(
            f"model_type={name!r} of {model.config_class.__name__} is "
            f"{'taken' if name else 'empty'}; choose another"
        )
    AutoConfig.register(name, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)
    model_classes[name] = model
    return model


for _model in (DTFForCausalLM, MoDForCausalLM):
    register(_model)
