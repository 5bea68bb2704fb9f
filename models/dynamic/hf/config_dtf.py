"""The configuration of a model of the family dtf in transformers."""

from __future__ import annotations

from models.dynamic.config import DTFConfig
from models.dynamic.hf.config import DynamicHFConfig


class DTFHFConfig(DynamicHFConfig):
    """The settings of `DTFConfig` as attributes."""

    model_type = "dtf"
    model_class = "DTFForCausalLM"
    settings_class = DTFConfig
