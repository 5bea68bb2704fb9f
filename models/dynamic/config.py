"""Configurations of the two families, `mod` and `dtf`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.common.config import DecoderConfig, PositiveFloat, PositiveInt

Share = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, lt=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
# Selection rules outside of training; topk looks at later tokens and is an oracle.
Rule = Literal["threshold", "predictor", "aux", "topk"]


_TRAINING = frozenset(
    {
        "causal_router_loss_weight",
        "expert_balance_loss_weight",
        "expert_capacity_factor",
        "expert_z_loss_weight",
        "prior_detach_input",
        "prior_loss",
        "prior_loss_weight",
        "router_aux_loss_weight",
        "router_detach",
        "router_init_std",
        "router_z_loss_weight",
        "routing_train",
        "tau_momentum",
    }
)


class DynamicConfig(DecoderConfig):
    """Settings shared by both families: a decoder of Qwen2 shape, and token selection.

    `capacity_gamma`: the fraction of a row's tokens that a routed layer computes, rounded up to a
    multiple of `capacity_multiple`; at 1 nothing is routed and the model is the dense stack.
    `causal_router`: the rule outside of training; `routing_train`: the rule in training.
    `causal_threshold`: a probability, for the rules predictor and aux.
    `force_first`: the first token of every document is always chosen.
    `num_experts`: the number of experts of every feed-forward layer, `experts_per_token` of them
    per computed token; with `expert_capacity_factor` training drops tokens beyond a row's capacity.
    `aliases`: other names of settings, accepted in run files and on command lines.
    """

    aliases: ClassVar[Mapping[str, str]] = {"capacity": "capacity_gamma"}

    rope_theta: PositiveFloat = 1_000_000.0
    rms_norm_eps: PositiveFloat = 1e-6
    qkv_bias: bool = True

    capacity_gamma: Share = 0.5
    capacity_multiple: PositiveInt = 1
    causal_router: Rule = "threshold"
    routing_train: Literal["topk", "threshold"] = "topk"
    tau_momentum: Momentum = 0.99
    causal_threshold: Probability = 0.5
    causal_router_loss_weight: Weight = 0.01
    predictor_hidden: PositiveInt = 128
    router_input: Literal["rmsnorm", "raw"] = "rmsnorm"
    router_init_std: Share = 0.02
    router_z_loss_weight: Weight = 1e-4
    force_first: bool = False

    num_experts: PositiveInt | None = None
    experts_per_token: PositiveInt = 2
    expert_capacity_factor: PositiveFloat | None = None
    expert_balance_loss_weight: Weight = 0.01
    expert_z_loss_weight: Weight = 1e-3

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.num_experts is None:
            for name in ("experts_per_token", "expert_capacity_factor"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect without experts; "
                        f"set num_experts or remove {name}"
                    )
        elif self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts="
                f"{self.num_experts}; choose fewer"
            )
        return self

    def function(self) -> dict[str, Any]:
        """As in `DecoderConfig`; settings of routing, losses and drops in training are excluded."""
        settings = super().function()
        return {name: value for name, value in settings.items() if name not in _TRAINING}

    @property
    def is_routed(self) -> bool:
        """False if every token is computed in every layer."""
        return self.capacity_gamma < 1.0

    @property
    def has_predictor(self) -> bool:
        return self.is_routed and self.causal_router == "predictor"


class MoDConfig(DynamicConfig):
    """Mixture of depths: layer i is routed where `i % mod_every == mod_offset`.

    `gate_fn`: the factor on a routed layer's update, from its score r: `sigmoid(r)`, r itself
    (`raw`), or 1 with the gradient of log sigmoid(r) (`st`). `router_score`: `linear`, or `random`
    as a control: a fixed random number for every token and position, with the factor 1.
    Source: arXiv 2404.02258.
    """

    family: Literal["mod"] = "mod"
    mod_every: PositiveInt = 2
    mod_offset: Annotated[int, Field(ge=0)] = 1
    gate_fn: Literal["sigmoid", "raw", "st"] = "sigmoid"
    router_score: Literal["linear", "random"] = "linear"
    router_aux_loss_weight: Weight = 0.01

    @model_validator(mode="after")
    def _check_routing(self) -> Self:
        if self.mod_offset >= self.mod_every:
            raise ValueError(
                f"mod_offset={self.mod_offset} is not below mod_every={self.mod_every}, so that no "
                "layer is routed; choose a smaller mod_offset"
            )
        if self.num_layers <= self.mod_offset:
            raise ValueError(
                f"num_layers={self.num_layers} with mod_offset={self.mod_offset} has no routed "
                "layer; choose more layers or a smaller mod_offset"
            )
        _check_aux_rule(self)
        return self

    def is_routed_layer(self, layer: int) -> bool:
        return self.is_routed and layer % self.mod_every == self.mod_offset

    @property
    def num_routed(self) -> int:
        """Routed layers."""
        return sum(self.is_routed_layer(i) for i in range(self.num_layers))


class DTFConfig(DynamicConfig):
    """Pairs of a decision layer for all tokens and a dynamic layer for surprising ones.

    `router_score`: `vpr`, both criteria; `ce` or `cu`, one of them; controls: `dst`, `dch`, the
    surprises themselves; `linear`, the score of `mod`; `random`. `gate_fn`: the factor on the
    dynamic layer's update is the gate G (`value`), or 1 with the gradient of log G (`st`).
    `surprise`: `mse`, or `kl` of a prior that also predicts a variance. `surprise_norm`: `ma`
    divides by the moving average over `ma_window` tokens, `none` takes the raw numbers.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        **DynamicConfig.aliases,
        "m_cu_init": "cu_detection_multiplier_init",
        "o_ce_init": "ce_criterion_offset_init",
    }

    family: Literal["dtf"] = "dtf"
    force_first: bool = True
    gate_fn: Literal["value", "st"] = "value"
    router_score: Literal["vpr", "ce", "cu", "dst", "dch", "linear", "random"] = "vpr"
    surprise: Literal["mse", "kl"] = "mse"
    surprise_norm: Literal["ma", "none"] = "ma"
    ma_window: PositiveInt = 100
    ma_skip_first: bool = True
    beta_ce_init: float = -0.3
    beta_cu_init: float = -0.6
    cu_detection_multiplier_init: PositiveFloat = 1.1
    ce_criterion_offset_init: PositiveFloat = 1.025
    learn_m_cu: bool = True
    learn_o_ce: bool = True
    router_detach: bool = True
    prior_type: Literal["mlp", "swiglu"] = "mlp"
    prior_ffn_intermediate_size_factor: PositiveFloat = 0.25
    prior_detach_input: bool = True
    prior_loss: Literal["nmse", "mse"] = "nmse"
    prior_loss_weight: Weight = 0.05

    @model_validator(mode="after")
    def _check_routing(self) -> Self:
        if self.num_layers < 2:
            raise ValueError(
                f"num_layers={self.num_layers} makes no pair of a decision and a dynamic layer; "
                "choose 2 or more"
            )
        if self.prior_size < 1:
            raise ValueError(
                f"prior_ffn_intermediate_size_factor={self.prior_ffn_intermediate_size_factor} of "
                f"hidden_size={self.hidden_size} leaves the prior no channels; choose a larger one"
            )
        _check_aux_rule(self)
        return self

    def function(self) -> dict[str, Any]:
        """As in `DynamicConfig`, without learnt constants, which are in the weights."""
        learnt = {
            "beta_ce_init": True,
            "beta_cu_init": True,
            "ce_criterion_offset_init": self.learn_o_ce,
            "cu_detection_multiplier_init": self.learn_m_cu,
        }
        settings = super().function()
        return {name: value for name, value in settings.items() if not learnt.get(name)}

    @property
    def num_pairs(self) -> int:
        return self.num_layers // 2

    @property
    def num_routed(self) -> int:
        """Dynamic layers that compute only some tokens."""
        return self.num_pairs if self.is_routed else 0

    @property
    def has_prior(self) -> bool:
        """Whether the score compares a layer's update with the prior's prediction."""
        return self.is_routed and self.router_score in ("vpr", "ce", "dch")

    @property
    def prior_size(self) -> int:
        """Intermediate size of the prior, even."""
        return 2 * int(self.hidden_size * self.prior_ffn_intermediate_size_factor / 2)

    def tensor_divisible(self) -> dict[str, int]:
        sizes = super().tensor_divisible()
        return sizes | ({"prior_ffn_intermediate_size": self.prior_size} if self.has_prior else {})


def _check_aux_rule(config: MoDConfig | DTFConfig) -> None:
    if config.causal_router == "aux" and config.router_score != "linear":
        raise ValueError(
            f"causal_router=aux with router_score={config.router_score}: only a linear score can "
            "be made a logit by an auxiliary loss; use router_score=linear or another causal_router"
        )
