"""Daria-Former in Hugging Face's form: its own names and its own modeling file."""

from __future__ import annotations

from models.base import HFModeling
from models.daria_former.config import DariaFormerConfig
from models.daria_former.specs import layer_specs
from models.hf_own import own_mapping

HF = own_mapping(
    "daria_former",
    config_cls=DariaFormerConfig,
    layer_specs=layer_specs,
    modeling=HFModeling(
        module="models.daria_former.hf_modeling",
        config_class="DariaFormerHFConfig",
        model_class="DariaFormerForCausalLM",
        settings={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_dim",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "num_key_value_heads": "num_kv_heads",
            "max_position_embeddings": "max_seq_len",
        },
    ),
)
