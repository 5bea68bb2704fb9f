"""Parameters and FLOPs of both families, from the configuration alone. No torch."""

from __future__ import annotations

import math

from models.common.decoder_counts import (
    attention_matrices,
    block_vectors,
    forward_flops,
    mlp_matrices,
    outer_parameters,
)
from models.dynamic.config import DTFConfig, DynamicConfig, MoDConfig


def num_parameters(config: MoDConfig | DTFConfig) -> int:
    """`V h (1 or 2) + L (block) + h`, routers and priors; a tied head counts once.

    Every layer has all of its parameters: only FLOPs shrink.
    """
    h = config.hidden_size
    block = _block_matmul_parameters(config, config.num_experts) + block_vectors(config)
    router = h if config.router_score == "linear" else 0
    if config.has_predictor:
        router += config.predictor_hidden * (h + 1)
    if isinstance(config, DTFConfig):
        router += _criteria_parameters(config) + _prior_parameters(config)
    return outer_parameters(config) + config.num_layers * block + config.num_routed * router


def forward_flops_per_token(config: MoDConfig | DTFConfig, seq_length: int) -> float:
    """Forward FLOPs per token of a row of `seq_length`, of which routed layers compute k tokens.

    Linear layers: 2 x their parameters, in a routed layer for a fraction k / s of the tokens.
    Attention: `4 n d (s + 1) / 2`, in a routed layer `4 n d (k + 1) / 2` for that fraction.
    Routers, predictors and priors run on every token. Look-ups, norms, rotations, softmax,
    activations, the surprises and sorting are not counted.
    """
    k = capacity_of(config, seq_length)
    share, routed = k / seq_length, config.num_routed
    dense = config.num_layers - routed
    linear = _block_matmul_parameters(config, config.experts_per_token) * (dense + share * routed)
    linear += routed * _choosing_matmul_parameters(config)
    keys = dense * (seq_length + 1) / 2 + routed * share * (k + 1) / 2
    return forward_flops(config, matrices=linear, keys=keys)


def capacity_of(config: DynamicConfig, seq_length: int) -> int:
    """Tokens of a row that a routed layer computes (models.dynamic.token_router.capacity)."""
    multiple = config.capacity_multiple
    return min(seq_length, math.ceil(config.capacity_gamma * seq_length / multiple) * multiple)


def _block_matmul_parameters(config: DynamicConfig, num_experts: int | None) -> int:
    """Matmul parameters of a block, with `num_experts` of its experts, if any, and their router."""
    feed_forward = mlp_matrices(config)
    if config.num_experts is not None:
        router = config.num_experts * config.hidden_size
        feed_forward = (num_experts or 0) * feed_forward + router
    return attention_matrices(config) + feed_forward


def _choosing_matmul_parameters(config: MoDConfig | DTFConfig) -> int:
    """Matmul parameters of the router, predictor and prior of one routed layer."""
    h = config.hidden_size
    count = h if config.router_score == "linear" else 0
    if config.has_predictor:
        count += config.predictor_hidden * (h + 1)
    if isinstance(config, DTFConfig) and config.has_prior:
        count += _prior_matmul_parameters(config)
    return count


def _prior_matmul_parameters(config: DTFConfig) -> int:
    inputs = 2 if config.prior_type == "swiglu" else 1
    outputs = 2 if config.surprise == "kl" else 1
    return (inputs + outputs) * config.hidden_size * config.prior_size


def _prior_parameters(config: DTFConfig) -> int:
    """Matrices, biases and the input norm."""
    if not config.has_prior:
        return 0
    inputs = 2 if config.prior_type == "swiglu" else 1
    outputs = 2 if config.surprise == "kl" else 1
    biases = inputs * config.prior_size + outputs * config.hidden_size
    return _prior_matmul_parameters(config) + biases + config.hidden_size


def _criteria_parameters(config: DTFConfig) -> int:
    ce, cu = (config.router_score in ("vpr", kind) for kind in ("ce", "cu"))
    return ce * (1 + config.learn_o_ce) + cu * (1 + config.learn_m_cu)
