"""The configuration of a Daria-Former in transformers."""

from __future__ import annotations

from typing import ClassVar

from models.daria_former.config import DariaFormerConfig
from models.hf.config import FamilyPreTrainedConfig


class DariaFormerHFConfig(FamilyPreTrainedConfig):
    """The settings of `DariaFormerConfig` as attributes."""

    model_type = "daria_former"
    model_class = "DariaFormerForCausalLM"
    settings_class = DariaFormerConfig
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "weight_tying",
    }
