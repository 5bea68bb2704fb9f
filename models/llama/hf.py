"""The llama family in Hugging Face's names: transformers' Llama, Mistral, Ministral, Qwen2 and
Qwen3."""

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
    """The contents of config.json: Qwen3 with `qk_norm`, Qwen2 with `qkv_bias`, Ministral with a
    window in some layers, Mistral with one in all or heads that LlamaConfig refuses, else Llama.

    Raises:
        ValueError: transformers has no model of this shape.
    """
    if config.qk_norm and config.qkv_bias:
        raise ValueError(
            "qk_norm=True with qkv_bias=True: transformers' Qwen3 has biases in all projections or "
            "in none, so it cannot be exported; set one of them to false"
        )
    if config.qk_norm:
        return _with_windows(config, "qwen3", "Qwen3ForCausalLM")
    if config.qkv_bias:
        return _with_windows(config, "qwen2", "Qwen2ForCausalLM")
    if config.layer_types is not None:
        own = {"sliding_window": config.sliding_window, "layer_types": config.layer_types}
        kind = {"model_type": "ministral", "architecture": "MinistralForCausalLM"}
        return decoder_contents(config, **kind) | own
    if config.sliding_window is not None or config.hidden_size % config.num_heads:
        contents = decoder_contents(config, model_type="mistral", architecture="MistralForCausalLM")
        return contents | {"sliding_window": config.sliding_window}
    return decoder_contents(config, model_type="llama", architecture="LlamaForCausalLM")


def _with_windows(config: LlamaConfig, model_type: str, architecture: str) -> dict[str, Any]:
    contents = decoder_contents(config, model_type=model_type, architecture=architecture)
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    kinds = ["full_attention" if each is None else "sliding_attention" for each in windows]
    contents |= {"layer_types": kinds}
    if config.sliding_window is None:
        return contents
    # Older versions read no layer_types: there the first so many layers have no window.
    full = next(i for i, each in enumerate(windows) if each is not None)
    return contents | {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": full,
    }


def from_hf_config(contents: Mapping[str, Any]) -> LlamaConfig:
    """Our configuration from the contents of a config.json of one of `HF.model_types`.

    Raises:
        ValueError: a setting that the family does not have.
    """
    settings = decoder_settings(contents, family="llama", windows=True)
    return LlamaConfig(**settings, qk_norm=contents["model_type"] == "qwen3")


def parameter_names(config: LlamaConfig) -> dict[str, str]:
    """Our parameter name -> theirs."""
    return decoder_names(config, qk_norm=config.qk_norm)


HF = HFMapping(
    model_types=("llama", "ministral", "mistral", "qwen2", "qwen3"),
    to_config=to_hf_config,
    from_config=from_hf_config,
    names=parameter_names,
    tied=tied_names,
    derived=DERIVED_NAMES,
)
