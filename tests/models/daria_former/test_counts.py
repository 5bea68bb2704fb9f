"""FLOPs against a count of every product, token by token."""

from __future__ import annotations

from itertools import pairwise

import pytest

from models.checkpoint import parameter_table
from models.daria_former.config import DariaFormerConfig
from models.daria_former.counts import forward_flops_per_token
from models.daria_former.model import FAMILY
from tests.models.daria_former.cases import MODALITIES, SUBSETS, config_of
from tests.tiers import spread

# Products with what is not a weight aside, a matrix costs a token one product per entry, but for
# those that learned slots meet once per row, and tables that are looked up.
PER_ROW = ("paths.persona.k_proj", "paths.persona.v_proj", "persona_projection")
NO_PRODUCT = ("tokens.weight", "persistent", "persona_slots", "noise_down", "noise_up", "sinks",
              "_gain", "initial_query", "gate_bias", "encoder.", "paths.modality.")  # fmt: skip


def _weights(config: DariaFormerConfig) -> tuple[int, int]:
    """Products of a token with weights, and products that a row costs once."""
    tokens = row = 0
    for name, (shape, *_) in parameter_table(FAMILY, config).items():
        size, is_matrix = shape.numel(), len(shape) == 2
        if any(part in name for part in NO_PRODUCT):
            continue
        if any(part in name for part in PER_ROW):
            row += size * (1 if "projection" in name else config.persona_memory_slots)
        elif is_matrix:
            tokens += size
            if "paths.memory." in name and "anchor" not in name:
                row += size * config.persistent_memory_slots
        elif "ffn.emotion_bias" in name or ("_norm.weight" in name and config.norm_type == "rms"):
            tokens += size  # a column of the matrix beside it
    if config.weight_tying:
        tokens += config.vocab_size * config.hidden_dim
    return tokens, row


def _attention(config: DariaFormerConfig, length: int) -> int:
    """Products of one row with keys, values and slots, one layer."""
    width = config.num_heads * config.head_size
    kv = config.num_kv_heads * config.head_size
    levels = (
        (config.working_stride, config.working_memory_slots),
        (config.episodic_stride, config.episodic_memory_slots),
    )
    total = 0
    for t in range(length):
        keys = 0
        if config.has("local"):
            keys += sum(0 <= t - j < config.sliding_window_size for j in range(length))
        if config.has("long"):
            keys += t + 1 + config.num_global_tokens
        if config.has("persona"):
            keys += config.persona_memory_slots + 1
        if config.has("modality"):
            keys += 1
        if config.has("memory"):
            start = t // config.segment_len * config.segment_len
            slots = config.persistent_memory_slots
            for stride, capacity in levels:
                ends = range(stride, length + 1, stride)
                slots += sum(end <= start < end + capacity * stride for end in ends)
            keys += min(slots, config.memory_top_k) + 1
            total += slots * kv if t == start else 0  # scores, once per segment
        total += 2 * keys * width
    return total


@pytest.mark.parametrize(("subset", "length"), spread([*SUBSETS, "modalities"], [1, 3, 40, 301]))
def test_flops_are_those_of_every_product_at_any_length(subset, length):
    config = config_of(**SUBSETS.get(subset, MODALITIES))
    tokens, row = _weights(config)
    products = length * tokens + row + config.num_layers * _attention(config, length)
    found = forward_flops_per_token(config, length)
    assert found == pytest.approx(2 * products / length, rel=1e-12)


def test_flops_per_token_grow_with_the_long_path_alone():
    with_long = [forward_flops_per_token(config_of(), n) for n in (8192, 16_384, 32_768)]
    without = [
        forward_flops_per_token(config_of(paths=("local", "memory")), n) for n in (8192, 16_384)
    ]
    width = 4 * 4 * 8  # layers, heads, dimensions
    for shorter, longer in pairwise(with_long):
        assert longer / shorter > 1.9
    assert with_long[1] - with_long[0] == pytest.approx(2 * 2 * width * 4096, rel=0.01)
    assert without[1] == pytest.approx(without[0], rel=1e-3)
