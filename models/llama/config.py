"""Configuration of the llama family. No torch."""

from __future__ import annotations

from typing import Literal

from models.common.config import DecoderConfig


class LlamaConfig(DecoderConfig):
    """A dense decoder: Llama shape by default; `qkv_bias: true` gives Qwen2 shape."""

    family: Literal["llama"] = "llama"
