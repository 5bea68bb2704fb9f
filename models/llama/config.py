"""Configuration of the llama family. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from models.common.config import STRICT, PositiveFloat, PositiveInt, RopeScaling


class LlamaConfig(BaseModel):
    """Sizes of a dense decoder with grouped-query attention, RoPE, RMSNorm and SwiGLU.

    Llama shape by default; `qkv_bias: true` gives Qwen2 shape. `head_dim` is
    `hidden_size / num_heads` unless it is set.
    """

    model_config = STRICT

    family: Literal["llama"] = "llama"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: PositiveFloat = 1e-5
    qkv_bias: bool = False
    tie_embeddings: bool = False
    init_std: Annotated[float, Field(gt=0, le=1)] = 0.02

    @model_validator(mode="after")
    def _check_heads(self) -> LlamaConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; choose a num_kv_heads that divides it"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "change one of them or set head_dim"
            )
        if self.head_size % 2:
            raise ValueError(
                f"head_dim={self.head_size} is odd, and rotary embeddings turn pairs of "
                "dimensions; choose an even head_dim"
            )
        return self

    @property
    def head_size(self) -> int:
        """`head_dim` as the model uses it."""
        return self.head_dim or self.hidden_size // self.num_heads

    def tensor_divisible(self) -> dict[str, int]:
        """The sizes that the tensor axis must divide."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
