"""Parameters and FLOPs of the llama family, from the configuration alone. No torch."""

from __future__ import annotations

from models.common.decoder_counts import (
    attention_matrices,
    block_vectors,
    forward_flops,
    mlp_matrices,
    outer_parameters,
)
from models.llama.config import LlamaConfig


def num_parameters(config: LlamaConfig) -> int:
    """`V h (1 or 2) + L (block) + h`; a tied head counts once."""
    block = attention_matrices(config) + mlp_matrices(config) + block_vectors(config)
    return outer_parameters(config) + config.num_layers * block


def forward_flops_per_token(config: LlamaConfig, seq_length: int) -> float:
    """Forward FLOPs per token of a sequence of `seq_length`.

    Linear layers and head: 2 x their parameters. Attention: `4 n d (s + 1) / 2` per layer, because
    a causal query meets (s + 1) / 2 keys on average; what a kernel computes beyond that is not
    counted.
    """
    matrices = config.num_layers * (attention_matrices(config) + mlp_matrices(config))
    return forward_flops(config, matrices=matrices, keys=config.num_layers * (seq_length + 1) / 2)
