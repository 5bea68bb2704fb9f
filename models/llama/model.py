"""The llama family: its ordered layers."""

from __future__ import annotations

from models.base import Counts, ModelFamily
from models.common.decoder import decoder_carry_schema, decoder_rotary, decoder_specs
from models.llama.config import LlamaConfig
from models.llama.counts import forward_flops_per_token, num_parameters
from models.llama.hf import HF
from models.llama.layers import LlamaBlock, LlamaEmbedding, LlamaHead
from parallel.carry import LayerSpec


def layer_specs(config: LlamaConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `block_0` ... `block_{L-1}`, `head`."""
    kwargs = {"config": config, "rotary": decoder_rotary(config)}
    blocks = [
        LayerSpec(f"block_{i}", LlamaBlock, kwargs | {"window": config.window_of(i)})
        for i in range(config.num_layers)
    ]
    return decoder_specs(
        config,
        blocks,
        segmented=segmented,
        tied=config.tie_embeddings,
        embedding=LlamaEmbedding,
        head=LlamaHead,
    )


FAMILY = ModelFamily(
    name="llama",
    config_cls=LlamaConfig,
    layer_specs=layer_specs,
    carry_schema=decoder_carry_schema,
    counts=Counts(num_parameters, forward_flops_per_token),
    hf=HF,
)
