"""Decoders of every shape that a GGUF file can hold, and llama.cpp's architecture of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from models.base import ModelFamily
from models.registry import get_config_class, get_family
from tests.models.checkpoints import config as llama_config
from tests.models.llama.test_config import SCALING, YARN

_ODD_YARN = YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "truncate": False}
_ROUTABLE = {
    "vocab_size": 301,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 256,
    "init_std": 0.2,
    "capacity_gamma": 1.0,
}


class Shape(NamedTuple):
    """`architecture`: llama.cpp's name."""

    architecture: str
    settings: dict[str, Any]
    family: str = "llama"

    @property
    def config(self) -> Any:
        if self.family == "llama":
            return llama_config(**self.settings)
        return get_config_class(self.family)(**(_ROUTABLE | self.settings))

    def family_of(self) -> ModelFamily:
        return get_family(self.family)


SHAPES = {
    "llama": Shape("llama", {}),
    "tied": Shape("llama", {"tie_embeddings": True, "num_kv_heads": 4}),
    "head_dim": Shape("llama", {"head_dim": 20}),
    "heads that do not divide": Shape("llama", {"num_heads": 6, "head_dim": 8}),
    "llama3 scaling": Shape("llama", {"rope_theta": 5e5, "rope_scaling": SCALING}),
    "linear scaling": Shape("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "yarn": Shape("llama", {"rope_scaling": YARN}),
    "yarn of other settings": Shape("llama", {"rope_scaling": _ODD_YARN}),
    "qwen2": Shape("qwen2", {"qkv_bias": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen2 tied": Shape("qwen2", {"qkv_bias": True, "tie_embeddings": True}),
    "qwen2 yarn": Shape("qwen2", {"qkv_bias": True, "rope_scaling": YARN}),
    "biases and head_dim": Shape("llama", {"qkv_bias": True, "head_dim": 12}),
    "biases and llama3 scaling": Shape("llama", {"qkv_bias": True, "rope_scaling": SCALING}),
    "qwen3": Shape("qwen3", {"qk_norm": True, "head_dim": 20, "rms_norm_eps": 1e-6}),
    "qwen3 tied": Shape("qwen3", {"qk_norm": True, "tie_embeddings": True}),
    "qwen3 linear": Shape(
        "qwen3", {"qk_norm": True, "rope_scaling": {"type": "linear", "factor": 4.0}}
    ),
    "qwen3 yarn": Shape(
        "qwen3", {"qk_norm": True, "rope_scaling": YARN | {"attention_factor": 1.3}}
    ),
    "norms and biases": Shape("qwen3", {"qk_norm": True, "qkv_bias": True}),
    "mod": Shape("qwen2", {}, family="mod"),
    "dtf": Shape("qwen2", {"tie_embeddings": True}, family="dtf"),
    "dtf odd": Shape("llama", {"num_layers": 5, "qkv_bias": False}, family="dtf"),
}
