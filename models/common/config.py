"""Parts of family configurations that several families share. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Every configuration class of a family uses these settings.
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LinearScaling(BaseModel):
    """Rotary frequencies divided by `factor`, so that longer contexts have the angles of shorter
    ones. Source: arXiv 2306.15595."""

    model_config = STRICT

    type: Literal["linear"]
    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)]


class YarnScaling(BaseModel):
    """Frequencies that turn fewer than `beta_slow` times in `original_max_position_embeddings` are
    divided by `factor`, those that turn more than `beta_fast` times are kept, with a linear ramp
    over the dimensions between, whose ends are rounded to whole ones with `truncate`.

    Rotated queries and keys are multiplied by `attention_factor`, `0.1 ln(factor) + 1` unless it is
    set. Source: YaRN (arXiv 2309.00071).
    """

    model_config = STRICT

    type: Literal["yarn"]
    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast} must be larger than beta_slow={self.beta_slow}; "
                "YaRN uses 32 and 1"
            )
        return self


class Llama3Scaling(BaseModel):
    """Frequencies of wavelengths longer than `original_max_position_embeddings / low_freq_factor`
    are divided by `factor`, those shorter than `original_max_position_embeddings /
    high_freq_factor` kept, and those between interpolated.
    Source: Llama 3.1 (arXiv 2407.21783, section 3.2).
    """

    model_config = STRICT

    type: Literal["llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be larger than "
                f"low_freq_factor={self.low_freq_factor}; Llama 3.1 uses 4 and 1"
            )
        return self


# Scaling of rotary frequencies for contexts longer than in the original pretraining.
RopeScaling = Annotated[LinearScaling | YarnScaling | Llama3Scaling, Field(discriminator="type")]


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's errors in one line: name, value, constraint and remedy."""
    first = error.errors()[0]
    name, value = ".".join(map(str, first["loc"])), first["input"]
    if first["type"] == "value_error" and not name:  # of a check of ours, which says all of it
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{name}={value!r} is no setting of {error.title}; correct the name or remove it"
    if first["type"] == "missing":
        return f"{name} is missing in {error.title}; set it"
    constraint = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{name}={value!r} {constraint}; change {name}"


def check_grouped_heads(config: Any, *, width: str) -> None:
    """Check that key and value heads divide the heads, and heads, unless `head_dim` is set, the
    setting `width`.

    Raises:
        ValueError: they do not.
    """
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads="
            f"{config.num_kv_heads}; choose a num_kv_heads that divides it"
        )
    if not config.head_dim and getattr(config, width) % config.num_heads:
        raise ValueError(
            f"{width}={getattr(config, width)} is not a multiple of num_heads={config.num_heads}; "
            "change one of them or set head_dim"
        )


class DecoderConfig(BaseModel):
    """Sizes of a decoder with grouped-query attention, RoPE, RMSNorm and SwiGLU.

    `head_dim` is `hidden_size / num_heads` unless it is set.
    """

    model_config = STRICT

    family: str
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
    def _check_heads(self) -> Self:
        check_grouped_heads(self, width="hidden_size")
        if self.head_size % 2:
            raise ValueError(
                f"head_dim={self.head_size} is odd, and rotary embeddings turn pairs of "
                "dimensions; choose an even head_dim"
            )
        return self

    @model_validator(mode="after")
    def _check_theta(self) -> Self:
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(
                f"rope_theta={self.rope_theta} with rope_scaling of type yarn must be larger than "
                "1, so that frequencies decrease; the usual one is 10000"
            )
        return self

    @property
    def head_size(self) -> int:
        """`head_dim` as the model uses it."""
        return self.head_dim or self.hidden_size // self.num_heads

    def function(self) -> dict[str, Any]:
        """The settings that determine what the model computes outside of training from its weights.

        Excluded are the standard deviation of initial weights, and the number of positions: a
        position has the same angles in a longer table.
        """
        settings = self.model_dump(mode="json", exclude={"init_std", "max_position_embeddings"})
        return settings | {"head_dim": self.head_size}

    def tensor_divisible(self) -> dict[str, int]:
        """The sizes that the tensor axis must divide."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
