"""The llama family in Hugging Face's names: transformers' Llama and Qwen2, read and written, and
Mistral without a window, read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.base import HFMapping
from models.hf.llama_names import (
    BLOCK_BIAS_NAMES,
    BLOCK_NAMES,
    DERIVED_NAMES,
    EMBEDDING_NAME,
    FINAL_NORM_NAME,
    HEAD_NAME,
    decoder_contents,
    decoder_settings,
    tied_names,
)
from models.llama.config import LlamaConfig


def parameter_names(config: LlamaConfig) -> dict[str, str]:
    """Our parameter name -> theirs, in the order of the layers; a tied head has none of its own."""
    block = BLOCK_NAMES | (BLOCK_BIAS_NAMES if config.qkv_bias else {})
    names = dict([EMBEDDING_NAME])
    for i in range(config.num_layers):
        names |= {
            f"block_{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in block.items()
        }
    return names | dict(
        [FINAL_NORM_NAME] if config.tie_embeddings else [FINAL_NORM_NAME, HEAD_NAME]
    )


def to_hf_config(config: LlamaConfig) -> dict[str, Any]:
    """The contents of config.json: Qwen2 with `qkv_bias`, Llama without.

    Raises:
        ValueError: transformers has no model of this shape.
    """
    if config.qkv_bias:
        return decoder_contents(config, model_type="qwen2", architecture="Qwen2ForCausalLM")
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} is not a multiple of num_heads={config.num_heads}, "
            "which transformers' LlamaConfig demands, so it cannot be exported; choose a "
            "num_heads that divides hidden_size"
        )
    return decoder_contents(config, model_type="llama", architecture="LlamaForCausalLM")


def from_hf_config(contents: Mapping[str, Any]) -> LlamaConfig:
    """Our configuration from the contents of a config.json of one of `HF.model_types`.

    Raises:
        ValueError: a setting that the family does not have.
    """
    return LlamaConfig(**decoder_settings(contents, family="llama"))


HF = HFMapping(
    model_types=("llama", "qwen2", "mistral"),
    to_config=to_hf_config,
    from_config=from_hf_config,
    names=parameter_names,
    tied=tied_names,
    derived=DERIVED_NAMES,
)
