"""DART in Hugging Face's form: its own names and code; Llama and Qwen2 as a beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from models.base import BaseModelMapping
from models.dart.config import DARTConfig
from models.dart.hf.generate_file import GENERATE_FILE, GENERATE_SOURCE
from models.hf.code_bundle import CodeFile
from models.hf.custom_code import own_code
from models.hf.llama_names import (
    check_sizes,
    decoder_names,
    decoder_settings,
)


def from_base_config(contents: Mapping[str, Any], changes: Mapping[str, Any]) -> DARTConfig:
    """A DART of the sizes of a Llama or Qwen2 model, whose layers both streams share."""
    settings = decoder_settings(contents, family="dart")
    return DARTConfig(**{**settings, "trunk": "shared", **changes})


def base_names(config: DARTConfig) -> dict[str, str]:
    """Our parameter name -> theirs, of the causal stream.

    Raises:
        ValueError: the streams have layers of their own, which another model does not have.
    """
    _check_shared(config)
    return decoder_names(config, block="pair_{}.causal")


def plain_config(config: DARTConfig) -> NoReturn:
    """Refused: the causal stream reads plans, so that it is no Llama or Qwen2 model.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"a dart model of trunk={config.trunk} reads plans of its blocks, which Llama and Qwen2 do "
        "not have; export it in its own form, without --plain"
    )


def _check_shared(config: DARTConfig) -> None:
    if config.trunk != "shared":
        raise ValueError(
            f"trunk={config.trunk}: half of the layers see noise, so they are no layers of a "
            "Llama or Qwen2 model; set trunk=shared"
        )
    if config.recursions > 1:
        raise ValueError(
            f"recursions={config.recursions}: a Llama or Qwen2 model applies every layer once; "
            "set recursions=1"
        )


HF = own_code(
    "dart",
    "models.dart.hf.config",
    "DARTHFConfig",
    files={GENERATE_FILE: CodeFile("models.dart.hf.generate", GENERATE_SOURCE)},
    base=BaseModelMapping(
        model_types=("llama", "qwen2"),
        from_config=from_base_config,
        defaults={"trunk": "shared"},
        check_sizes=check_sizes,
        names=base_names,
        to_config=plain_config,
    ),
)
