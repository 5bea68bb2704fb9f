"""Configuration of the dart family. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from models.common.config import DecoderConfig, PositiveInt, first_problem

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# Settings that only training reads.
_TRAINING = frozenset({"ar_weight", "draft_weight", "p_plan", "p_uncond"})

# Published names -> ours.
PUBLISHED_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_seq_length": "max_position_embeddings",
    "layer_norm_eps": "rms_norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}


class DARTConfig(DecoderConfig):
    """Sizes and choices of a DART; the defaults are those of the published quick start.

    `num_layers`: with `trunk="dual"` half of them are causal and half are diffusion blocks, so the
    number is even; with `trunk="shared"` every layer serves both streams. `block_size`: tokens that
    are denoised together. `diffusion_steps` T: noise levels; level T hides a block completely.
    `ar_weight` w: the loss is `w AR + (1 - w) (diffusion + draft_weight draft)`. `p_plan`: the
    probability that a block of a training row is hidden completely, which lets the causal stream
    read its plan. `p_uncond`: the probability, at every block but the first, that both streams see
    nothing before it. `recursions`: how often a layer is applied. `exchange_rank`: rank of the
    projection from the plan to the causal stream; 0 is a full matrix, None is 0 up to a hidden
    size of 2048 and hidden_size / 8 above. Settings may be given under their published names.
    """

    family: Literal["dart"] = "dart"
    vocab_size: PositiveInt = 50257
    hidden_size: PositiveInt = 768
    intermediate_size: PositiveInt = 2048
    num_layers: PositiveInt = 12
    num_heads: PositiveInt = 12
    num_kv_heads: PositiveInt = 12
    max_position_embeddings: PositiveInt = 1024
    tie_embeddings: bool = True

    trunk: Literal["dual", "shared"] = "dual"
    block_size: PositiveInt = 16
    diffusion_type: Literal["masked", "gaussian"] = "masked"
    diffusion_schedule: Literal["linear", "cosine", "quadratic"] = "cosine"
    diffusion_steps: PositiveInt = 1000
    recursions: PositiveInt = 1
    exchange_rank: Annotated[int, Field(ge=0)] | None = None

    ar_weight: Share = 0.5
    draft_weight: Weight = 0.25
    p_plan: Annotated[float, Field(ge=0, lt=1)] = 0.5
    p_uncond: Annotated[float, Field(ge=0, lt=1)] = 0.002

    def __init__(self, **values: Any) -> None:
        """Raises ValueError: the first setting that is unknown or out of range, in one line."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None

    # `model_validate` does not pass here, so that run files keep the places of their errors.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        """Rename published settings; every query head has its own keys unless told otherwise."""
        if not isinstance(values, dict):
            return values
        named: dict[str, Any] = {}
        for name, value in values.items():
            own: str = PUBLISHED_NAMES.get(name) or name
            if own in named:
                other = next(n for n in values if n != name and PUBLISHED_NAMES.get(n, n) == own)
                raise ValueError(
                    f"{name}={value} is given beside {other}={values[other]}, another name of the "
                    "same setting; keep one"
                )
            named[own] = value
        if "num_heads" in named:
            named.setdefault("num_kv_heads", named["num_heads"])
        return named

    @model_validator(mode="after")
    def _check_dart(self) -> Self:
        if self.trunk == "dual" and self.num_layers % 2:
            raise ValueError(
                f"num_layers={self.num_layers} is odd, and trunk=dual gives half of the layers to "
                "each stream; choose an even number or trunk=shared"
            )
        if self.diffusion_steps < 2:
            raise ValueError(
                f"diffusion_steps={self.diffusion_steps} leaves no level between clean and hidden; "
                "choose 2 or more"
            )
        if self.exchange_size > self.hidden_size:
            raise ValueError(
                f"exchange_rank={self.exchange_rank} is more than hidden_size={self.hidden_size}; "
                "use 0 for a full matrix"
            )
        return self

    @property
    def num_pairs(self) -> int:
        """Layers of the model's list: pairs of blocks, or shared blocks."""
        return self.num_layers // 2 if self.trunk == "dual" else self.num_layers

    @property
    def exchange_size(self) -> int:
        """`exchange_rank` as the model uses it."""
        if self.exchange_rank is not None:
            return self.exchange_rank
        return 0 if self.hidden_size <= 2048 else self.hidden_size // 8

    @property
    def num_hidden_layers(self) -> int:
        return self.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.num_heads

    @property
    def max_seq_length(self) -> int:
        return self.max_position_embeddings

    def function(self) -> dict[str, Any]:
        """As in `DecoderConfig`; weights of losses and probabilities of training are excluded."""
        settings = super().function()
        rest = {name: value for name, value in settings.items() if name not in _TRAINING}
        return rest | {"exchange_rank": self.exchange_size}
