"""Configuration of the llama family. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from models.common.config import DecoderConfig, PositiveInt

AttentionType = Literal["full_attention", "sliding_attention"]


class LlamaConfig(DecoderConfig):
    """A dense decoder: Llama shape by default; `qkv_bias: true` gives Qwen2 shape, `qk_norm: true`
    that of Qwen3 and `sliding_window` that of Mistral, with `layer_types` of Ministral.

    `qk_norm`: queries and keys are normalised over the dimensions of a head, with learned gains,
    before they are rotated. `sliding_window`: a query sees that many positions, its own included.
    `layer_types`: for every layer whether it has the window; None: all have it, if it is set.
    """

    family: Literal["llama"] = "llama"
    qk_norm: bool = False
    sliding_window: PositiveInt | None = None
    layer_types: list[AttentionType] | None = None

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
