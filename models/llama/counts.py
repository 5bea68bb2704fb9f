"""Parameters and FLOPs of the llama family, from the configuration alone. No torch."""

from __future__ import annotations

from models.llama.config import LlamaConfig


def num_parameters(config: LlamaConfig) -> int:
    """`V h (1 or 2) + L (block) + h`; a tied head counts once."""
    h = config.hidden_size
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    block = _block_matmul_parameters(config) + 2 * h + biases * config.qkv_bias
    tables = 1 if config.tie_embeddings else 2
    return tables * config.vocab_size * h + config.num_layers * block + h


def forward_flops_per_token(config: LlamaConfig, seq_length: int) -> float:
    """Forward FLOPs per token of a sequence of `seq_length`: two per multiply-add of the matmuls.

    Linear layers and head: 2 x their parameters. Attention: `4 n d (s + 1) / 2` per layer, because
    a causal query meets (s + 1) / 2 keys on average; what a kernel computes beyond that is not
    counted. Lookups, norms, rotations, softmax and activations are not counted.
    """
    linear = config.num_layers * _block_matmul_parameters(config)
    linear += config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_size * (seq_length + 1) / 2
    return 2.0 * linear + 4.0 * attention


def _block_matmul_parameters(config: LlamaConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * (heads * config.head_size + 3 * config.intermediate_size)
