"""Configuration of the mixture family. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from models.common.config import STRICT


class MixtureConfig(BaseModel):
    model_config = STRICT

    family: Literal["mixture"] = "mixture"
    vocab_size: int = 61
    hidden_size: int = 32
    intermediate_size: int = 24
    num_layers: int = 2
    num_heads: int = 4
    num_experts: int = 4
    top_k: int = 2
    capacity_factor: float | None = None
    max_position_embeddings: int = 256
    init_std: float = 0.3
    balance_weight: float = 0.1
    z_weight: float = 0.01

    def function(self) -> dict[str, Any]:
        training = {"init_std", "max_position_embeddings", "balance_weight", "z_weight"}
        return self.model_dump(exclude=training | {"capacity_factor"})

    def tensor_divisible(self) -> dict[str, int]:
        return {"num_heads": self.num_heads, "intermediate_size": self.intermediate_size}
