"""The configuration of a model of the family mod in transformers."""

from __future__ import annotations

from models.dynamic.config import MoDConfig
from models.dynamic.hf.config import DynamicHFConfig


class MoDHFConfig(DynamicHFConfig):
    """The settings of `MoDConfig` as attributes."""

    model_type = "mod"
    model_class = "MoDForCausalLM"
    settings_class = MoDConfig
