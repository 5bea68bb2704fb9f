"""The families under the contract test, each with a tiny configuration that shows all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from models.base import ModelFamily
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from tests.models import awkward


class Case(NamedTuple):
    family: ModelFamily
    config: Any


# Vocabularies that a tensor size of 2 does not divide, so that padding is always exercised.
_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 256,
    "init_std": 0.3,  # large, so that every path matters
}

CASES = {
    "llama": Case(LLAMA, LlamaConfig(**_LLAMA)),
    "llama_qwen2_shape": Case(
        LLAMA, LlamaConfig(**_LLAMA, qkv_bias=True, tie_embeddings=True, rope_theta=1e6)
    ),
    "awkward": Case(awkward.FAMILY, awkward.AwkwardConfig(num_layers=4)),
}
