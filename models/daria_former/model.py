"""The Daria-Former family: its ordered layers, its carry, its loss."""

from __future__ import annotations

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
from models.common.decoder import decoder_specs
from models.daria_former.carry import AUX, DariaCarry, DariaOutput
from models.daria_former.config import DariaFormerConfig
from models.daria_former.counts import forward_flops_per_token, num_parameters
from models.daria_former.hf.mapping import HF
from models.daria_former.layers import DACBlock, DariaEmbedding, DariaHead
from models.daria_former.paths import Rotaries
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext
from parallel.cross_entropy import cross_entropy_and_entropy
from parallel.regions import local_seq_len


def layer_specs(config: DariaFormerConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `block_0` ... `block_{L-1}`, `head`."""
    shared = {"config": config, "rotaries": Rotaries.of(config)}
    blocks = []
    for i in range(config.num_layers):
        # Without the number of the layer, so that equal blocks have equal specs.
        own = {"updates_emotion": config.has_update_site(i), "is_last": i + 1 == config.num_layers}
        blocks.append(LayerSpec(f"block_{i}", DACBlock, shared | own))
    return decoder_specs(
        config,
        blocks,
        segmented=segmented,
        tied=config.weight_tying,
        embedding=DariaEmbedding,
        head=DariaHead,
    )


def carry_schema(
    config: DariaFormerConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
    num_modality_tokens: int = 0,
) -> DariaCarry:
    """The shapes that cross a stage boundary on this rank.

    `num_modality_tokens`: how many the encoders make of a row's images and sound.

    Raises:
        ValueError: sequence parallelism with a sequence that the tensor size does not divide, or
            encoders for which the data has no input, which would never be trained.
    """
    if config.modality_enabled and not num_modality_tokens:
        raise ValueError(
            f"image_enabled={config.image_enabled}, audio_enabled={config.audio_enabled}, and the "
            "data has neither images nor sound; set both to false, or train with "
            "models.daria_former.standalone.training on batches that have them"
        )
    local_length = local_seq_len(seq_length, ctx=ctx)
    dtype, tokens = ctx.precision.dtype, (micro_batch_size, seq_length)

    def activation(*shape: int, dtype: torch.dtype = torch.float32) -> Field:
        return Field(shape, dtype, gradient=True)

    per_token = (seq_length, micro_batch_size)
    num_slots = 2 * config.persistent_memory_slots * config.has("memory")
    num_slots += config.persona_memory_slots * config.has("persona")
    modality = (num_modality_tokens, micro_batch_size, config.hidden_dim)
    return DariaCarry(
        hidden=activation(local_length, micro_batch_size, config.hidden_dim, dtype=dtype),
        emotion=activation(*per_token, config.emotion_dim),
        priors=activation(*per_token, config.num_priors) if config.num_priors else None,
        aux=activation(micro_batch_size, len(AUX)),
        bank=activation(num_slots, 1, config.hidden_dim, dtype=dtype) if num_slots else None,
        modality=activation(*modality, dtype=dtype) if num_modality_tokens else None,
        positions=Field(tokens, torch.int32) if segmented else None,
        keys=Field(tokens, torch.int64) if config.is_noisy else None,
    )


def loss(
    output: DariaOutput,
    labels: Tensor,
    *,
    config: DariaFormerConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    """Cross entropy of the scored tokens, and the weighted losses of `aux` and of rhythm."""
    if num_scored is None:
        num_scored = num_scored_in(labels)
    rhythm_loss = output.aux.new_zeros(())
    if config.rhythm_loss_weight:
        losses, entropies = cross_entropy_and_entropy(output.logits, labels, ctx=ctx)
        rhythm = rhythm_regularizer(entropies, config.rhythm_target_var)
        rhythm_loss = scored_mean(rhythm, labels, num_scored)
    else:
        losses = token_losses(output, labels, ctx)
    lm_loss = losses.sum() / num_scored
    aux = dict(zip(AUX, scored_mean(output.aux, labels, num_scored).unbind(), strict=True))
    total = (
        lm_loss
        + config.rhythm_loss_weight * rhythm_loss
        + config.gate_balance_weight * aux["gate_loss"]
        + config.memory_loss_weight * aux["memory_loss"]
        + config.emotion_loss_weight * aux["emotion_loss"]
        + config.repetition_loss_weight * aux["repetition_loss"]
    )
    terms = {"lm_loss": lm_loss, "rhythm_loss": rhythm_loss, **aux}
    return LossOutput(total, {name: term.detach() for name, term in terms.items()})


def rhythm_regularizer(entropies: Tensor, target: float) -> Tensor:
    """`relu(v - Var_t(entropy_t))` of every row, in nats^2: entropies [s, b] of the predictions ->
    [b].

    Predictions of an even, dull rhythm are penalised up to the variance v; more is not rewarded.
    """
    variances = (entropies - entropies.mean(dim=0)).square().mean(dim=0)
    return (target - variances).relu()


FAMILY = ModelFamily(
    name="daria_former",
    config_cls=DariaFormerConfig,
    layer_specs=layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", "rhythm_loss", *AUX),
    counts=Counts(num_parameters, forward_flops_per_token),
    hf=HF,
)
