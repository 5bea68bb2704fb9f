"""The configuration of an AGIFORMER in transformers."""

from __future__ import annotations

from typing import ClassVar

from models.agiformer.config import AgiformerConfig
from models.hf.config import FamilyPreTrainedConfig


class AgiformerHFConfig(FamilyPreTrainedConfig):
    """The settings of `AgiformerConfig` as attributes."""

    model_type = "agiformer"
    model_class = "AgiformerForCausalLM"
    settings_class = AgiformerConfig
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    }
