"""Parameters and FLOPs of the agiformer family, from the configuration alone. No torch.

Symbols: h hidden, f intermediate, L layers, n heads, E head dimension, D byte channels, P patch
size, K patch kernel, W window, M thinking steps, m head channels, V vocabulary.
"""

from __future__ import annotations

from models.agiformer.config import AgiformerConfig
from models.common.decoder_counts import mean_keys


def num_parameters(config: AgiformerConfig) -> int:
    """Encoder `V D + K D h + 2 h`, L blocks, reasoning `9 h^2 + 9 h + 1`, head
    `P h m + P (P - 1) / 2 V m + m^2 + V m`."""
    h, m, v = config.hidden_size, config.head_hidden, config.vocab_size
    size, pairs = config.patch_size, config.patch_size * (config.patch_size - 1) // 2
    encoder = v * config.byte_size + config.patch_kernel * config.byte_size * h + 2 * h
    reasoning = 9 * h * h + 8 * h + (0 if config.halting == "none" else h + 1)
    head = size * h * m + m * m + v * m
    if config.byte_head == "causal":
        head += pairs * v * m
    return encoder + config.num_layers * _block(config) + reasoning + head


def _block(config: AgiformerConfig) -> int:
    h, n = config.hidden_size, config.num_heads
    vectors = 2 * h  # norms
    if config.has_memory:
        gains = h if config.fusion == "triple" else n * config.head_dim
        vectors += gains + n + h + 1  # of the memory, decay, gate
    return _block_matrices(config) + vectors


def _block_matrices(config: AgiformerConfig) -> int:
    """Projections of heads, decay, fusion and feed-forward layer."""
    h = config.hidden_size
    branches = 2 if config.has_memory else 1
    square = 3 * branches + 1 + (branches if config.fusion == "triple" else 0)
    decay = h * config.num_heads if config.has_memory else 0
    return square * h * h + decay + 3 * h * config.intermediate_size


def forward_flops_per_token(config: AgiformerConfig, seq_length: int) -> float:
    """Forward FLOPs per byte of a row of `seq_length` bytes, two per multiply-add.

    A P-th of those of a patch, and those of the head. Attention: `4 n E` for each of the min(i, W)
    keys of patch i. Memory: `4 n E (E + 1)`, writing and reading a state; what chunks compute
    beyond that is not counted. All M thinking steps: generation takes fewer. Look-ups, norms and
    activations are not counted.
    """
    h, m = config.hidden_size, config.head_hidden
    patches = config.num_patches(seq_length)
    encoder = config.patch_kernel * config.byte_size * h
    block = _block_matrices(config)
    heads = mean_keys(patches, window=config.window_size) * h
    if config.has_memory:
        block += h  # the gate
        heads += h * (config.head_dim + 1)
    halt = 0 if config.halting == "none" else h
    reasoning = config.thinking_steps * (9 * h * h + halt)
    project = config.patch_size * h * m
    linear = encoder + config.num_layers * block + reasoning + project
    per_patch = 2.0 * linear + 4.0 * config.num_layers * heads
    return per_patch * patches / seq_length + 2.0 * (m * m + config.vocab_size * m)
