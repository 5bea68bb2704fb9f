"""Parameters and FLOPs of the amrpa family, from the configuration alone. No torch.

Symbols: n query heads, d head dimension, e hidden size of the selection MLP, w layers that a layer
reads, s length of a sequence.
"""

from __future__ import annotations

import itertools

from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.targets import plan_layers
from models.common.decoder_counts import (
    attention_matrices,
    block_vectors,
    forward_flops,
    mlp_matrices,
    outer_parameters,
)


def num_parameters(config: AMRPALlamaConfig) -> int:
    """Those of llama, and of every layer that reads `3 n d^2 + (2 d + 2) e + 2`.

    That is W_a, W_g, W_m, two layers of the MLP and two scalars; a layer that reads one other
    selects nothing and has neither W_a nor MLP.
    """
    block = attention_matrices(config) + mlp_matrices(config) + block_vectors(config)
    biases = config.alpha_mlp_hidden * (config.alpha_mlp_layers - 1)
    per_head = config.num_heads * config.head_size**2
    total = outer_parameters(config) + config.num_layers * block
    for window in windows(config):
        total += 2 * per_head + 2
        if window > 1:
            total += per_head + sum(_mlp_shapes(config)) + biases
    return total


def forward_flops_per_token(config: AMRPALlamaConfig, seq_length: int) -> float:
    """Forward FLOPs per token of a sequence of `seq_length`: those of llama and of the memory.

    Of every layer that reads w others: `4 n d (s + 1) / 2` for each of them with history_kind=qk
    (and pattern, which is the same function), none with context; `2 n d^2` for W_g, W_m and w times
    W_a; per head the MLP w times, but once where it multiplies the query.
    """
    matrices: float = config.num_layers * (attention_matrices(config) + mlp_matrices(config))
    keys = config.num_layers * (seq_length + 1) / 2
    for window in windows(config):
        if config.history_kind != "context":
            keys += window * (seq_length + 1) / 2
        matrices += _memory_products(config, window)
    return forward_flops(config, matrices=matrices, keys=keys)


def windows(config: AMRPALlamaConfig) -> list[int]:
    """The number of layers that each layer with memory reads."""
    plan = plan_layers(config, config.num_layers)
    return [len(reads) for reads in plan.reads.values()]


def _memory_products(config: AMRPALlamaConfig, window: int) -> int:
    """Multiply-adds per token of one layer's memory, without attention."""
    n, d = config.num_heads, config.head_size
    if window == 1:
        return 2 * n * d * d
    first, *others = _mlp_shapes(config)
    of_query = first // 2
    return n * ((2 + window) * d * d + of_query + window * (first // 2 + sum(others)))


def _mlp_shapes(config: AMRPALlamaConfig) -> list[int]:
    """Parameters of the weights of the selection MLP, by layer."""
    hidden = [config.alpha_mlp_hidden] * (config.alpha_mlp_layers - 1)
    sizes = [2 * config.head_size, *hidden, 1]
    return [rows * columns for columns, rows in itertools.pairwise(sizes)]
