"""The configuration of a DART in transformers."""

from __future__ import annotations

from typing import ClassVar

from models.dart.config import DARTConfig
from models.hf.config import FamilyPreTrainedConfig


class DARTHFConfig(FamilyPreTrainedConfig):
    """The settings of `DARTConfig` as attributes."""

    model_type = "dart"
    model_class = "DARTForCausalLM"
    settings_class = DARTConfig
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "tie_word_embeddings": "tie_embeddings",
        "max_seq_length": "max_position_embeddings",
    }
