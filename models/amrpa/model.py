"""The amrpa family: its ordered layers and its loss."""

from __future__ import annotations

from torch import Tensor

from models.amrpa.carry import AUX, AMRPAOutput, carry_schema
from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.counts import forward_flops_per_token, num_parameters
from models.amrpa.hf.mapping import HF
from models.amrpa.history import part_of
from models.amrpa.layers import AMRPABlock, AMRPAEmbedding, AMRPAHead
from models.amrpa.targets import plan_layers
from models.base import Counts, LossOutput, ModelFamily, num_scored_in, scored_mean, token_losses
from models.common.decoder import decoder_rotary, decoder_specs
from parallel.carry import LayerSpec
from parallel.context import ParallelContext


def layer_specs(config: AMRPALlamaConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `block_0` ... `block_{L-1}`, `head`."""
    plan = plan_layers(config, config.num_layers)
    shared = {
        "config": config,
        "rotary": decoder_rotary(config),
        "num_readers": len(plan.reads),
    }
    blocks = [
        LayerSpec(f"block_{i}", AMRPABlock, shared | {"part": part_of(i, plan)})
        for i in range(config.num_layers)
    ]
    return decoder_specs(
        config,
        blocks,
        segmented=segmented,
        tied=config.tie_embeddings,
        embedding=AMRPAEmbedding,
        head=AMRPAHead,
    )


def loss(
    output: AMRPAOutput,
    labels: Tensor,
    *,
    config: AMRPALlamaConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    """Cross entropy of the scored tokens and the two weighted losses of the memory."""
    if num_scored is None:
        num_scored = num_scored_in(labels)
    lm_loss = token_losses(output, labels, ctx).sum() / num_scored
    aux = dict(zip(AUX, scored_mean(output.aux, labels, num_scored).unbind(), strict=True))
    total = lm_loss + config.diversity_weight * aux["diversity_loss"]
    total = total + config.gate_reg_weight * aux["gate_loss"]
    terms = {"lm_loss": lm_loss, **aux}
    return LossOutput(total, {name: term.detach() for name, term in terms.items()})


FAMILY = ModelFamily(
    name="amrpa",
    config_cls=AMRPALlamaConfig,
    layer_specs=layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", *AUX),
    counts=Counts(num_parameters, forward_flops_per_token),
    hf=HF,
)
