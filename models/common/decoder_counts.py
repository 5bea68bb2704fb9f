"""Parameters and FLOPs of the parts of a decoder, in closed form from a `DecoderConfig`. No torch.

Symbols: h hidden, f intermediate, n query heads, g key and value heads, d head dimension,
V vocabulary.
"""

from __future__ import annotations

from models.common.config import DecoderConfig


def outer_parameters(config: DecoderConfig) -> int:
    """Parameters of token table, final norm and head: `V h (1 tied, 2 untied) + h`."""
    tables = 1 if config.tie_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + config.hidden_size


def attention_matrices(config: DecoderConfig) -> int:
    """Parameters of the four projections of attention: `h (2 n + 2 g) d`."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * heads * config.head_size


def mlp_matrices(config: DecoderConfig) -> int:
    """Parameters of a gated feed-forward layer: `3 h f`."""
    return 3 * config.hidden_size * config.intermediate_size


def block_vectors(config: DecoderConfig) -> int:
    """Parameters of a block's two norms, `2 h`, and of its biases with `qkv_bias`,
    `(n + 2 g) d`."""
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    return 2 * config.hidden_size + biases * config.qkv_bias


def mean_keys(length: int, *, window: int | None = None) -> float:
    """Keys that a causal query of a sequence sees on average; with a window at most that many."""
    growing = length if window is None else min(length, window)
    return (growing * (growing + 1) / 2 + (length - growing) * growing) / length


def forward_flops(config: DecoderConfig, *, matrices: float, keys: float) -> float:
    """Forward FLOPs per token, two per multiply-add.

    `matrices`: parameters of the linear layers applied to a token, without the head, which is
    added. `keys`: keys visible to a query on average, summed over the layers; each costs `4 n d`.
    Look-ups, norms, rotations, softmax and activations are not counted.
    """
    linear = matrices + config.vocab_size * config.hidden_size
    return 2.0 * linear + 4.0 * config.num_heads * config.head_size * keys
