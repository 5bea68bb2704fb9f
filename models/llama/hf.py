"""The llama family in Hugging Face's names: transformers' Llama and Qwen2, read and written, and
Mistral without a window, read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.base import HFMapping
from models.hf.llama_names import (
    DERIVED_NAMES,
    decoder_contents,
    decoder_names,
    decoder_settings,
    tied_names,
)
from models.llama.config import LlamaConfig


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
    names=decoder_names,
    tied=tied_names,
    derived=DERIVED_NAMES,
)
