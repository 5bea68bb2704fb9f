"""Configuration of the llama family. No torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from models.common.config import DecoderConfig, PositiveInt

AttentionType = Literal["full_attention", "sliding_attention"]
# Model types of transformers that compute what another one with fewer settings computes, too.
NamedType = Literal["mistral", "ministral", "phi3"]
# What none of them has.
_OTHER_SHAPES = (
    "qk_norm",
    "qkv_bias",
    "norm_after",
    "activation",
    "zero_centered_gamma",
    "scale_embeddings",
)


class LlamaConfig(DecoderConfig):
    """A dense decoder: Llama shape by default; `qkv_bias: true` gives Qwen2 shape, `qk_norm: true`
    that of Qwen3 and `sliding_window` that of Mistral, with `layer_types` of Ministral.

    `qk_norm`: queries and keys are normalised before they are rotated, with learned gains: over the
    dimensions of a head, or with "all_heads" over those of all heads together. `sliding_window`: a
    query sees that many positions, its own included. `layer_types`: for every layer whether it has
    the window; None: all have it, if it is set.

    `norm_after`: a block normalises what attention and feed-forward layer return instead of what
    they are given; with "all_heads" the shape of OLMo 2. `activation` of the gate,
    `zero_centered_gamma` (gains are `1 + weight`) and `scale_embeddings` (by `sqrt(hidden_size)`)
    are together the shape of Gemma.

    `hf_type`: the model type of transformers to export as where several compute this function; None
    is the plainest of them. It is refused with what that type lacks.
    """

    family: Literal["llama"] = "llama"
    qk_norm: bool | Literal["all_heads"] = False
    sliding_window: PositiveInt | None = None
    layer_types: list[AttentionType] | None = None
    norm_after: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    zero_centered_gamma: bool = False
    scale_embeddings: bool = False
    hf_type: NamedType | None = None

    def function(self) -> dict[str, Any]:
        """Without the name under which the same function is exported."""
        settings = super().function()
        del settings["hf_type"]
        return settings

    @model_validator(mode="after")
    def _check_hf_type(self) -> Self:
        if self.hf_type is None:
            return self
        fields = type(self).model_fields
        unfit = [*_OTHER_SHAPES]
        if self.hf_type != "ministral":
            unfit.append("layer_types")
        if self.hf_type == "phi3":  # which transformers scales in a way of its own only
            unfit.append("rope_scaling")
        for name in unfit:
            if (value := getattr(self, name)) != fields[name].default:
                raise ValueError(
                    f"{name}={value} with hf_type={self.hf_type}: transformers' {self.hf_type} "
                    "has no such setting; leave one of them out (hf_type=null)"
                )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        window, longest = self.sliding_window, self.max_position_embeddings
        if window is not None and window >= longest:
            raise ValueError(
                f"sliding_window={window} hides nothing from max_position_embeddings={longest} "
                "positions; leave it out or make it smaller"
            )
        if self.layer_types is None:
            return self
        if len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_layers={self.num_layers};"
                " give one for every layer, or none if all have sliding_window"
            )
        if window is None or set(self.layer_types) != {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layer_types={self.layer_types} with sliding_window={window}: it says which layers"
                " have the window and which have not; set both, or leave layer_types out"
            )
        return self

    def window_of(self, layer: int) -> int | None:
        """The window of a layer; None: it sees every earlier position."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window
