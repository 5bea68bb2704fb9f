"""The dart family: its ordered layers, carry and loss."""

from __future__ import annotations

import torch
from torch import Tensor

from models.base import Counts, LossOutput, ModelFamily, num_scored_in, token_losses
from models.common.decoder import decoder_carry_schema, decoder_specs
from models.common.rope import RotaryTable
from models.dart.carry import DARTCarry, DARTOutput
from models.dart.config import DARTConfig
from models.dart.counts import forward_flops_per_token, num_parameters
from models.dart.hf.mapping import HF
from models.dart.layers import DARTEmbedding, DARTHead, DARTPair
from models.dart.noise import DIFFUSION, DRAFT
from models.dart.schedule import level_weights
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext
from parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy


def layer_specs(config: DARTConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `pair_0` ..., `head`."""
    # The last block of a row may be denoised beyond its end.
    rotary = RotaryTable(
        config.head_size,
        config.max_position_embeddings + config.block_size,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
    )
    kwargs = {"config": config, "rotary": rotary, "segmented": segmented}
    pairs = [LayerSpec(f"pair_{i}", DARTPair, kwargs) for i in range(config.num_pairs)]
    return decoder_specs(
        config,
        pairs,
        segmented=segmented,
        tied=config.tie_embeddings,
        embedding=DARTEmbedding,
        head=DARTHead,
    )


def carry_schema(
    config: DARTConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> DARTCarry:
    """The shapes that cross a stage boundary on this rank.

    Raises:
        ValueError: sequence parallelism with a sequence that the tensor size does not divide.
    """
    sizes = {"micro_batch_size": micro_batch_size, "seq_length": seq_length}
    stream = decoder_carry_schema(config, ctx, **sizes, segmented=segmented).hidden
    modulation = (config.diffusion_steps + 1, 6 * config.hidden_size)
    places = Field((micro_batch_size, seq_length), torch.int32)
    return DARTCarry(
        hidden=stream,
        noised=stream,
        modulation=Field(modulation, ctx.precision.dtype, gradient=True),
        levels=places,
        targets=places,
        positions=places if segmented or config.p_uncond > 0 else None,
    )


def loss(
    output: DARTOutput,
    labels: Tensor,
    *,
    config: DARTConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    """`w AR + (1 - w) (diffusion + draft_weight draft)`, w = ar_weight, in nats per token.

    AR: cross entropy of the causal stream, `lm_loss`. Diffusion: that of hidden tokens, weighted by
    their level (models.dart.schedule) and divided by the share 1 - p_plan of such blocks: with
    masked noise an unbiased estimate of a bound on the negative log-likelihood. Draft: that of
    completely hidden blocks, divided by their share p_plan.
    """
    if num_scored is None:
        num_scored = num_scored_in(labels)
    causal = token_losses(output, labels, ctx).sum() / num_scored
    drafts = vocab_parallel_cross_entropy(
        output.draft_logits, labels.masked_fill(output.targets == 0, IGNORED_LABEL), ctx=ctx
    )
    diffusion = (drafts * _diffusion_weights(output, config).to(drafts.dtype)).sum() / num_scored
    is_draft = (output.targets.T == DRAFT) / max(config.p_plan, torch.finfo(drafts.dtype).tiny)
    draft = (drafts * is_draft.to(drafts.dtype)).sum() / num_scored if config.p_plan else 0 * causal
    total = config.ar_weight * causal
    total = total + (1.0 - config.ar_weight) * (diffusion + config.draft_weight * draft)
    terms = {"lm_loss": causal, "diffusion_loss": diffusion, "draft_loss": draft}
    return LossOutput(total, {name: term.detach() for name, term in terms.items()})


def _diffusion_weights(output: DARTOutput, config: DARTConfig) -> Tensor:
    """[s, b]: weight of every place in the diffusion loss."""
    weights = level_weights(config, output.levels.device)[output.levels.T.long()]
    return weights * (output.targets.T == DIFFUSION) / (1.0 - config.p_plan)


FAMILY = ModelFamily(
    name="dart",
    config_cls=DARTConfig,
    layer_specs=layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", "diffusion_loss", "draft_loss"),
    counts=Counts(num_parameters, forward_flops_per_token),
    hf=HF,
    # No layer looks ahead, but noise is drawn from the whole row before a block, other documents
    # included, so that in training a packed document has other noise than alone.
    causal_in_training=False,
)
