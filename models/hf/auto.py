"""Registration of our model classes with transformers' Auto classes."""

from __future__ import annotations

from typing import TypeVar

from transformers import AutoConfig, AutoModelForCausalLM

from models.hf.modeling import FamilyForCausalLM

Model = TypeVar("Model", bound=type[FamilyForCausalLM])

# `model_type` -> class; `register` adds others.
model_classes: dict[str, type[FamilyForCausalLM]] = {}


def register(model: Model) -> Model:
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
