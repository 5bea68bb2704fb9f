"""AMRPALlama in Hugging Face's form: its own names and code; Llama and Qwen2 as a beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from models.amrpa.config import AMRPALlamaConfig
from models.base import BaseModelMapping
from models.hf.custom_code import own_code
from models.hf.llama_names import (
    BLOCK_BIAS_NAMES,
    BLOCK_NAMES,
    EMBEDDING_NAME,
    FINAL_NORM_NAME,
    HEAD_NAME,
    check_sizes,
    decoder_settings,
)


def from_base_config(contents: Mapping[str, Any], changes: Mapping[str, Any]) -> AMRPALlamaConfig:
    """A model of the sizes of a Llama or Qwen2 model."""
    return AMRPALlamaConfig(**{**decoder_settings(contents, family="amrpa"), **changes})


def base_names(config: AMRPALlamaConfig) -> dict[str, str]:
    """Our parameter name -> theirs, of everything but the memory."""
    block = BLOCK_NAMES | (BLOCK_BIAS_NAMES if config.qkv_bias else {})
    names = dict([EMBEDDING_NAME])
    for i in range(config.num_layers):
        names |= {
            f"block_{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in block.items()
        }
    last = [FINAL_NORM_NAME] if config.tie_embeddings else [FINAL_NORM_NAME, HEAD_NAME]
    return names | dict(last)


def plain_config(config: AMRPALlamaConfig) -> NoReturn:
    """Refused: queries are corrected, so that it is no Llama or Qwen2 model.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"an amrpa model with target_layers={config.target_layers!r} corrects queries by its "
        "memory, which Llama and Qwen2 do not have; export it in its own form, without --plain"
    )


HF = own_code(
    "amrpa",
    "models.amrpa.hf.config",
    "AMRPALlamaHFConfig",
    base=BaseModelMapping(
        model_types=("llama", "qwen2"),
        from_config=from_base_config,
        defaults={},  # W_m starts at 0
        check_sizes=check_sizes,
        names=base_names,
        to_config=plain_config,
    ),
)
