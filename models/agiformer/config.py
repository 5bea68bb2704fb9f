"""Configuration of the agiformer family. No torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from models.common.config import STRICT, PositiveFloat, PositiveInt

# Settings that training alone reads, or that are only where a model starts. Plasticity is a buffer
# of the weights; the setting is its first value.
_NOT_OF_THE_FUNCTION = {
    "cuda_memory_kernel",
    "dropout",
    "init_std",
    "max_position_embeddings",
    "plasticity",
    "ponder_loss_weight",
}


class AgiformerConfig(BaseModel):
    """Sizes and choices of an AGIFORMER.

    `vocab_size`: 256 byte values, and 256 as the id that ends a document. `patch_size` P bytes make
    one latent, which `patch_kernel` bytes enter. `byte_dim`: channels of the byte table, by default
    `hidden_size`. `window_size`: patches that attention sees, the own one included.
    `cuda_memory_kernel`: what computes the chunks of the memory on a CUDA device in fp32; elsewhere
    it is torch. `plasticity`: alpha in (0, 1], the largest decay of the memory. `decay_floor`: the
    smallest input-dependent decay before alpha. `thinking_steps`: M, the most steps of the
    reasoning block. `documents_per_row`: documents of a packed row that are kept apart (see
    `models.agiformer.patches`).
    """

    model_config = STRICT
    changeable_settings: ClassVar[frozenset[str]] = frozenset({"plasticity"})

    family: Literal["agiformer"] = "agiformer"
    vocab_size: PositiveInt = 257
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt = 4
    patch_kernel: PositiveInt = 6
    byte_dim: PositiveInt | None = None
    window_size: PositiveInt = 128
    memory: Literal["hebbian", "none"] = "hebbian"
    memory_chunk_size: PositiveInt = 64
    cuda_memory_kernel: Literal["torch", "fla"] = "torch"
    plasticity: Annotated[float, Field(gt=0, le=1)] = 1.0
    decay_floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fusion: Literal["single", "triple"] = "single"
    thinking_steps: PositiveInt = 3
    halting: Literal["act", "soft", "none"] = "act"
    act_epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.01
    ponder_loss_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    byte_head: Literal["causal", "independent"] = "causal"
    head_hidden: PositiveInt = 512
    documents_per_row: PositiveInt = 16
    max_position_embeddings: PositiveInt = 1 << 24
    rope_theta: PositiveFloat = 10_000.0
    rms_norm_eps: PositiveFloat = 1e-6
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init_std: Annotated[float, Field(gt=0, le=1)] = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_heads={self.num_heads} gives heads of "
                f"{self.head_dim} dimensions, and rotary embeddings turn pairs; make it even"
            )
        if self.patch_kernel < self.patch_size:
            raise ValueError(
                f"patch_kernel={self.patch_kernel} is smaller than patch_size={self.patch_size}, "
                "so that bytes between two patches would be lost; raise patch_kernel"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden_size // self.num_heads

    @property
    def byte_size(self) -> int:
        """`byte_dim` as the model uses it."""
        return self.byte_dim or self.hidden_size

    @property
    def has_memory(self) -> bool:
        return self.memory == "hebbian"

    @property
    def sequence_unit(self) -> int:
        """Rows of a run are whole patches."""
        return self.patch_size

    def num_patches(self, seq_length: int) -> int:
        """Patches of a row of one document: every byte belongs to one, the last may be short."""
        return -(-seq_length // self.patch_size)

    def function(self) -> dict[str, Any]:
        """The settings that determine what the model computes outside of training from its
        weights."""
        settings = self.model_dump(mode="json", exclude=_NOT_OF_THE_FUNCTION)
        return settings | {"byte_dim": self.byte_size}

    def tensor_divisible(self) -> dict[str, int]:
        """The sizes that the tensor axis must divide."""
        return {
            "num_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "byte_dim": self.byte_size,
            "head_hidden": self.head_hidden,
        }
