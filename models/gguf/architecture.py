"""The llama.cpp model that computes the function of a decoder, and the settings that it reads.

A model of llama.cpp is a fixed graph; what it does not compute, such as a sliding window in `llama`
or factors of single frequencies in `qwen3`, it leaves out of a file without a word. So each setting
is either held by the graph or refused here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.base import ModelFamily
from models.common.config import (
    DecoderConfig,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from models.common.rope import attention_factor, stretch

# The model types of transformers whose function is that of a `DecoderConfig`.
_DECODERS = {"gemma", "llama", "ministral", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
# Settings of a decoder that its graphs of Llama, Qwen2 and Qwen3 have with one value.
_FIXED = {
    "norm_after": False,
    "activation": "silu",
    "zero_centered_gamma": False,
    "scale_embeddings": False,
}
_MAX_LAYERS = 512  # of any of its models
_INSTEAD = "export it with to-hf, for programs that run models of transformers"

Value = bool | int | float | str


class Architecture(NamedTuple):
    """`name`: llama.cpp's model. `settings`: key -> value. `factors`: fp32 [d/2], what it divides
    each rotary frequency by, or None. `pairs`: it rotates dimensions 2i and 2i + 1 of a head
    together, so that rows of queries and keys change places."""

    name: str
    settings: dict[str, Value]
    factors: Tensor | None
    pairs: bool


def decoder_names(family: ModelFamily, config: Any) -> dict[str, str]:
    """Our parameter name -> that of transformers' Llama, Qwen2 or Qwen3 for a model that is one.

    Raises:
        ValueError: it computes something else.
    """
    hf = family.hf
    if hf is not None and not hf.code and _DECODERS.issuperset(hf.model_types):
        return hf.names(config)
    base = None if hf is None else hf.base
    if (
        base is None
        or base.check_same_function is None
        or not _DECODERS.issuperset(base.model_types)
    ):
        raise ValueError(
            f"model.family={family.name}: llama.cpp has no model that computes this family, so it "
            f"has no GGUF file; {_INSTEAD}"
        )
    base.check_same_function(config)
    return base.names(config)


def architecture_of(config: DecoderConfig) -> Architecture:
    """llama.cpp's model for a decoder: `qwen3` if heads have norms, `qwen2` for biases where its
    graph holds the rest, else `llama`, which also holds biases, heads of any size and factors.

    Raises:
        ValueError: a setting that no model of llama.cpp with the rest of them computes.
    """
    if config.num_layers > _MAX_LAYERS:
        raise ValueError(
            f"num_layers={config.num_layers}: llama.cpp loads models of at most {_MAX_LAYERS}; "
            f"{_INSTEAD}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"sliding_window={window}: in llama.cpp models of this shape see every earlier "
            f"position, so the file would hold another function; {_INSTEAD}"
        )
    fixed = _FIXED | ({"qk_norm": True} if getattr(config, "qk_norm", False) else {})
    for name, value in fixed.items():
        given = getattr(config, name, value)
        if given != value:
            raise ValueError(
                f"{name}={given}: a GGUF file is written for llama.cpp's llama, qwen2 and qwen3, "
                f"which compute {name}={value}; {_INSTEAD}"
            )
    whole_heads = config.head_size * config.num_heads == config.hidden_size
    if getattr(config, "qk_norm", False):
        if not _is_native(config):
            raise ValueError(
                f"rope_scaling={_described(config.rope_scaling)} with qk_norm=True: llama.cpp's "
                "qwen3 scales frequencies as linear, or as yarn with beta_fast=32, beta_slow=1 and "
                f"truncate=True; {_INSTEAD}"
            )
        name = "qwen3"
    elif config.qkv_bias and whole_heads and _is_native(config):
        name = "qwen2"
    else:
        name = "llama"
    rope, factors = _rope_settings(config)
    settings = _sizes(config) | rope
    keyed = {f"{name}.{key}": value for key, value in settings.items()}
    return Architecture(name, keyed, factors, pairs=name == "llama")


def _sizes(config: DecoderConfig) -> dict[str, Value]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_size,
        "rope.freq_base": config.rope_theta,
    }


def _rope_settings(config: DecoderConfig) -> tuple[dict[str, Value], Tensor | None]:
    """Settings of scaled frequencies, and factors where settings cannot say it."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}, None
    if not _is_native(config):
        plain, scaled = _frequencies(config, None), _frequencies(config, scaling)
        gain = attention_factor(scaling)
        return {} if gain == 1 else {"rope.scaling.attn_factor": gain}, plain / scaled
    settings: dict[str, Value] = {
        "rope.scaling.type": scaling.type,
        "rope.scaling.factor": scaling.factor,
    }
    if isinstance(scaling, YarnScaling):
        settings["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        # Its graphs multiply by 0.1 ln(factor) + 1 themselves.
        own = 0.1 * math.log(scaling.factor) + 1
        if (gain := attention_factor(scaling)) != own:
            settings["rope.scaling.attn_factor"] = gain / own
    return settings, None


def _is_native(config: DecoderConfig) -> bool:
    """Whether all of llama.cpp's models scale the frequencies so by settings alone."""
    scaling = config.rope_scaling
    if scaling is None or isinstance(scaling, LinearScaling):
        return True
    if isinstance(scaling, Llama3Scaling):
        return False
    # Their graphs read none of the settings of YaRN's ramp.
    usual = YarnScaling(
        type="yarn",
        factor=scaling.factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )
    return torch.equal(_frequencies(config, scaling), _frequencies(config, usual))


def _frequencies(config: DecoderConfig, scaling: RopeScaling | None) -> Tensor:
    """fp32 [d/2], as models.common.rope computes them."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_size)
    if scaling is None:
        return frequencies
    return stretch(frequencies, scaling, theta=config.rope_theta)


def _described(scaling: RopeScaling | None) -> str:
    assert scaling is not None
    values = scaling.model_dump(exclude_none=True)
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"
