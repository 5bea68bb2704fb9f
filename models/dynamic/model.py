"""The families `mod` and `dtf`: their ordered layers, carry and loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.base import (
    Counts,
    LossOutput,
    ModelFamily,
    num_scored_in,
    scored_mean,
    token_losses,
)
from models.common.decoder import decoder_carry_schema, decoder_rotary, decoder_specs
from models.dynamic.carry import DTF_AUX, MOD_AUX, DynamicCarry, DynamicOutput
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.counts import forward_flops_per_token, num_parameters
from models.dynamic.hf.mapping import DTF_HF, MOD_HF
from models.dynamic.layers import DenseLayer, DynamicEmbedding, DynamicHead, RoutedLayer
from models.dynamic.pair import DTFPair
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext


def mod_layer_specs(config: MoDConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `layer_0` ... `layer_{L-1}`, `head`."""
    kwargs = {"config": config, "rotary": decoder_rotary(config)}
    layers = [
        LayerSpec(f"layer_{i}", RoutedLayer if config.is_routed_layer(i) else DenseLayer, kwargs)
        for i in range(config.num_layers)
    ]
    return _between_embedding_and_head(config, layers, segmented=segmented)


def dtf_layer_specs(config: DTFConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `pair_0` ..., a last `layer_{L-1}` where L is odd, `head`.

    At capacity_gamma=1 it is the plain stack, `layer_0` ... `layer_{L-1}`.
    """
    kwargs = {"config": config, "rotary": decoder_rotary(config)}
    layers = [LayerSpec(f"pair_{i}", DTFPair, kwargs) for i in range(config.num_routed)]
    layers += [
        LayerSpec(f"layer_{i}", DenseLayer, kwargs)
        for i in range(2 * config.num_routed, config.num_layers)
    ]
    return _between_embedding_and_head(config, layers, segmented=segmented)


def carry_schema(
    config: MoDConfig | DTFConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> DynamicCarry:
    """The shapes that cross a stage boundary on this rank.

    Raises:
        ValueError: sequence parallelism with a sequence that the tensor size does not divide.
    """
    sizes = {"micro_batch_size": micro_batch_size, "seq_length": seq_length}
    dense = decoder_carry_schema(config, ctx, **sizes, segmented=segmented)
    takes_keys = config.num_routed > 0 and config.router_score == "random"
    return DynamicCarry(
        hidden=dense.hidden,
        aux=Field((micro_batch_size, len(_aux_names(config))), torch.float32, gradient=True),
        positions=dense.positions,
        keys=Field((micro_batch_size, seq_length), torch.int64) if takes_keys else None,
    )


def loss(
    output: DynamicOutput,
    labels: Tensor,
    *,
    config: MoDConfig | DTFConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    """Cross entropy of the scored tokens and the weighted losses of `aux`."""
    if num_scored is None:
        num_scored = num_scored_in(labels)
    lm_loss = token_losses(output, labels, ctx).sum() / num_scored
    means = scored_mean(output.aux, labels, num_scored)
    aux = dict(zip(_aux_names(config), means.unbind(), strict=True))
    total = lm_loss
    for name, weight in loss_weights(config).items():
        total = total + weight * aux[name]
    terms = {"lm_loss": lm_loss, **aux}
    return LossOutput(total, {name: term.detach() for name, term in terms.items()})


def loss_weights(config: MoDConfig | DTFConfig) -> Mapping[str, float]:
    """Entry of `aux` -> its weight in the loss."""
    weights = {
        "router_z_loss": config.router_z_loss_weight,
        "router_loss": config.causal_router_loss_weight,
        "expert_balance_loss": config.expert_balance_loss_weight,
        "expert_z_loss": config.expert_z_loss_weight,
    }
    if isinstance(config, DTFConfig):
        return weights | {"prior_loss": config.prior_loss_weight}
    if config.causal_router == "aux":
        weights["router_loss"] = config.router_aux_loss_weight
    return weights


def _aux_names(config: MoDConfig | DTFConfig) -> tuple[str, ...]:
    return DTF_AUX if isinstance(config, DTFConfig) else MOD_AUX


def _between_embedding_and_head(
    config: MoDConfig | DTFConfig, layers: list[LayerSpec], *, segmented: bool
) -> list[LayerSpec]:
    return decoder_specs(
        config,
        layers,
        segmented=segmented,
        tied=config.tie_embeddings,
        embedding=DynamicEmbedding,
        head=DynamicHead,
    )


MOD = ModelFamily(
    name="mod",
    config_cls=MoDConfig,
    layer_specs=mod_layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", *MOD_AUX),
    counts=Counts(num_parameters, forward_flops_per_token),
    hf=MOD_HF,
    causal_in_training=False,
)

DTF = ModelFamily(
    name="dtf",
    config_cls=DTFConfig,
    layer_specs=dtf_layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", *DTF_AUX),
    counts=Counts(num_parameters, forward_flops_per_token),
    hf=DTF_HF,
    causal_in_training=False,
)
