"""Parameters and FLOPs of the dart family, from the configuration alone. No torch."""

from __future__ import annotations

from models.common.decoder_counts import (
    attention_matrices,
    block_vectors,
    forward_flops,
    mlp_matrices,
    outer_parameters,
)
from models.dart.config import DARTConfig

_TIME_CHANNELS = 256


def num_parameters(config: DARTConfig) -> int:
    """Table, head and their norms, time embedding, blocks, tables of modulation and exchange."""
    h = config.hidden_size
    block = attention_matrices(config) + mlp_matrices(config) + block_vectors(config)
    time = _time_matrices(config) + 8 * h  # and its biases
    per_pair = 6 * h * config.recursions + _exchange(config)
    return (
        outer_parameters(config)
        + 2 * h  # the second norm of the head, the hidden token's vector
        + time
        + config.num_layers * block
        + config.num_pairs * per_pair
    )


def forward_flops_per_token(config: DARTConfig, seq_length: int) -> float:
    """Forward FLOPs per token of a row of `seq_length` whose blocks are hidden completely.

    Linear layers: 2 x their parameters, each applied once per token and recursion, with trunk=
    shared once per stream; keys and values of the context once more; the head for both streams;
    the time embedding once per row. Attention: `4 n d` for each of (s + 1) / 2 keys in the causal
    stream and (s + 3) / 2 in the other. A block with tokens sees up to block_size / 2 keys more.
    """
    matrices = attention_matrices(config) + mlp_matrices(config)
    context = 2 * config.hidden_size * config.num_kv_heads * config.head_size
    pairs = config.num_pairs * config.recursions
    linear: float = pairs * (2 * matrices + context + _exchange(config))
    linear += config.vocab_size * config.hidden_size + _time_matrices(config) / seq_length
    keys = pairs * ((seq_length + 1) / 2 + (seq_length + 3) / 2)
    return forward_flops(config, matrices=linear, keys=keys)


def _exchange(config: DARTConfig) -> int:
    h, size = config.hidden_size, config.exchange_size
    return 2 * h * size if size else h * h


def _time_matrices(config: DARTConfig) -> int:
    h = config.hidden_size
    return h * (_TIME_CHANNELS + 7 * h)
