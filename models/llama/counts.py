"""Parameters and FLOPs of the llama family, from the configuration alone. No torch."""

from __future__ import annotations

from models.common.decoder_counts import (
    attention_matrices,
    block_vectors,
    forward_flops,
    mean_keys,
    mlp_matrices,
    outer_parameters,
)
from models.llama.config import LlamaConfig


def num_parameters(config: LlamaConfig) -> int:
    """`V h (1 or 2) + L (block) + h`; a tied head counts once. Gains of `qk_norm`: `2 d`, over all
    heads `(n + g) d`."""
    block = attention_matrices(config) + mlp_matrices(config) + block_vectors(config)
    if config.qk_norm:
        all_heads = config.num_heads + config.num_kv_heads
        block += config.head_size * (all_heads if config.qk_norm == "all_heads" else 2)
    return outer_parameters(config) + config.num_layers * block


def forward_flops_per_token(config: LlamaConfig, seq_length: int) -> float:
    """Forward FLOPs per token of a sequence of `seq_length`.

    Linear layers and head: 2 x their parameters. Attention: `4 n d` for each key that a query sees,
    (s + 1) / 2 on average without a window; what a kernel computes beyond that is not counted.
    """
    matrices = config.num_layers * (attention_matrices(config) + mlp_matrices(config))
    windows = (config.window_of(layer) for layer in range(config.num_layers))
    keys = sum(mean_keys(seq_length, window=window) for window in windows)
    return forward_flops(config, matrices=matrices, keys=keys)
