"""Parts of family configurations that several families share. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Every configuration class of a family uses these settings.
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RopeScaling(BaseModel):
    """Rotary frequencies stretched for contexts longer than those of the first pretraining.

    `type: llama3` divides the frequencies of wavelengths longer than
    `original_max_position_embeddings / low_freq_factor` by `factor`, keeps those shorter than
    `original_max_position_embeddings / high_freq_factor`, and interpolates between.
    Source: Llama 3.1 (arXiv 2407.21783, section 3.2).
    """

    model_config = STRICT

    type: Literal["llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    @model_validator(mode="after")
    def _check_factors(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be larger than "
                f"low_freq_factor={self.low_freq_factor}; Llama 3.1 uses 4 and 1"
            )
        return self
