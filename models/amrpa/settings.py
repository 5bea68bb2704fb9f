"""Settings of the cross-layer memory, in an injected model and in a pretrained one. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from models.common.config import STRICT, PositiveFloat, PositiveInt

Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MemorySettings(BaseModel):
    """Settings of the cross-layer memory; names and defaults are those of the published package.

    * `memory_decay` (gamma), `memory_noise` (epsilon): fading ink.
    * `adaptive_window`, `max_window_size`: how many earlier layers a layer reads.
    * `gate_sensitivity` (gamma_g), `gate_bias` (b_g): initial values of two learned scalars per
      layer; `gate_activation`.
    * `alpha_temperature` (T), `alpha_mlp_hidden`, `alpha_mlp_layers`: the selection MLP.
    * `target_layers`: see `models.amrpa.targets`.
    * `dropout`: inside the selection MLP. `diversity_weight`, `gate_reg_weight`: the two losses.

    Beyond the published package:

    * `history_kind`: what a layer leaves behind. `qk`: queries and keys; `pattern`: the S x S
      matrix itself, for reference; `context`: the attention output, an approximation.
    * `history_scope`: which layers are remembered, `all` or the `targets` alone.
    * `detach_history`: whether gradients stop at the history.
    """

    model_config = STRICT

    memory_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    memory_noise: Annotated[float, Field(ge=0, lt=1)] = 0.001
    adaptive_window: bool = True
    max_window_size: PositiveInt = 4
    gate_sensitivity: Finite = 2.0
    gate_bias: Finite = -0.25
    gate_activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid"
    alpha_temperature: PositiveFloat = 0.25
    alpha_mlp_hidden: PositiveInt = 384
    alpha_mlp_layers: PositiveInt = 2
    target_layers: str | list[int] = "last_4"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    diversity_weight: Weight = 0.005
    gate_reg_weight: Weight = 0.05
    history_kind: Literal["qk", "pattern", "context"] = "qk"
    history_scope: Literal["all", "targets"] = "all"
    detach_history: bool = True
