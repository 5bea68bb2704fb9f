"""The llama family in Hugging Face's names: transformers' Llama, Mistral, Ministral, Phi-3, Qwen2,
Qwen3, OLMo 2 and Gemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from models.base import HFMapping
from models.hf.llama_names import (
    DERIVED_NAMES,
    decoder_contents,
    decoder_names,
    decoder_settings,
    fused_names,
    tied_names,
)
from models.llama.config import LlamaConfig, NamedType

# Model type -> the class that config.json names.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "gemma": "GemmaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What distinguishes their functions, besides windows and the size of heads: of every model type.
_PLAIN = {
    "qk_norm": False,
    "qkv_bias": False,
    "norm_after": False,
    "activation": "silu",
    "zero_centered_gamma": False,
    "scale_embeddings": False,
}
_GEMMA = {"activation": "gelu_tanh", "zero_centered_gamma": True, "scale_embeddings": True}
_FUNCTIONS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "olmo2": {"qk_norm": "all_heads", "norm_after": True},
    "gemma": _GEMMA,
}
# Model types whose layers may have windows.
_WINDOWED = {"ministral", "mistral", "phi3", "qwen2", "qwen3"}


def to_hf_config(config: LlamaConfig) -> dict[str, Any]:
    """The contents of config.json of the plainest model of transformers that computes the same
    function, or of `hf_type`.

    Raises:
        ValueError: transformers has no model of this shape.
    """
    model_type = _model_type(config)
    contents = decoder_contents(
        config, model_type=model_type, architecture=_ARCHITECTURES[model_type]
    )
    if model_type in ("qwen2", "qwen3"):
        return contents | _windows_of_qwen(config)
    window = config.sliding_window
    if model_type == "ministral":
        # Its class always makes masks of windows, and one of this length hides nothing.
        window = window or config.max_position_embeddings
        contents |= {"layer_types": _kinds(config)}
    if model_type in _WINDOWED:
        contents |= {"sliding_window": window}
    return contents


def _model_type(config: LlamaConfig) -> str:
    own = {name: value for name in _PLAIN if (value := getattr(config, name)) != _PLAIN[name]}
    kind = next((each for each, function in _FUNCTIONS.items() if function == own), None)
    if own and kind is None:
        raise ValueError(
            f"{_listed(own)}: of such settings transformers has Qwen2 with "
            f"{_listed(_FUNCTIONS['qwen2'])}, Qwen3 with {_listed(_FUNCTIONS['qwen3'])}, OLMo 2 "
            f"with {_listed(_FUNCTIONS['olmo2'])}, Gemma with {_listed(_GEMMA)}, and no other "
            "combination, so it cannot be exported; change them before training"
        )
    window, kinds = config.sliding_window, config.layer_types
    if kind is not None and kind not in _WINDOWED and window is not None:
        raise ValueError(
            f"sliding_window={window} with {_listed(own)}: transformers' {kind} has no windows, so "
            "it cannot be exported; leave sliding_window out before training"
        )
    if kind is None and kinds is not None:
        kind = "ministral"
    if kind is None and (window is not None or config.hidden_size % config.num_heads):
        kind = "mistral"
    return config.hf_type or kind or "llama"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _kinds(config: LlamaConfig) -> list[str]:
    windows = (config.window_of(layer) for layer in range(config.num_layers))
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _windows_of_qwen(config: LlamaConfig) -> dict[str, Any]:
    kinds = _kinds(config)
    if config.sliding_window is None:
        return {"layer_types": kinds}
    # Older versions read no layer_types: there the first so many layers have no window.
    return {
        "layer_types": kinds,
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": kinds.index("sliding_attention"),
    }


def from_hf_config(contents: Mapping[str, Any]) -> LlamaConfig:
    """Our configuration from the contents of a config.json of one of `HF.model_types`.

    Raises:
        ValueError: a setting that the family does not have.
    """
    model_type = contents["model_type"]
    settings = decoder_settings(contents, family="llama", windows=True)
    config = LlamaConfig(**settings | _FUNCTIONS.get(model_type, {}))
    if model_type == "mistral" and config.layer_types is not None:
        return config  # as their Auto classes read it, a Ministral
    if model_type in get_args(NamedType) and _model_type(config) != model_type:
        return LlamaConfig(**config.model_dump() | {"hf_type": model_type})
    return config


def parameter_names(config: LlamaConfig) -> dict[str, str]:
    """Our parameter name -> theirs."""
    return decoder_names(config, qk_norm=bool(config.qk_norm), norm_after=config.norm_after)


def parameters_in_one(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """Their parameter -> those whose rows it holds."""
    return fused_names(config) if config.hf_type == "phi3" else {}


HF = HFMapping(
    model_types=tuple(_ARCHITECTURES),
    to_config=to_hf_config,
    from_config=from_hf_config,
    names=parameter_names,
    tied=tied_names,
    derived=DERIVED_NAMES,
    fused=parameters_in_one,
)
