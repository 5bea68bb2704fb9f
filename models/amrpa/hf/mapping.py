"""AMRPALlama in Hugging Face's form: its own names and code; Llama and Qwen2 as a beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from models.amrpa.config import AMRPALlamaConfig
from models.base import BaseModelMapping
from models.hf.custom_code import own_code
from models.hf.llama_names import (
    check_sizes,
    decoder_names,
    decoder_settings,
)


def from_base_config(contents: Mapping[str, Any], changes: Mapping[str, Any]) -> AMRPALlamaConfig:
    """A model of the sizes of a Llama or Qwen2 model."""
    return AMRPALlamaConfig(**{**decoder_settings(contents, family="amrpa"), **changes})


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
        names=decoder_names,
        to_config=plain_config,
    ),
)
