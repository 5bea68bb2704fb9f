from __future__ import annotations

import pytest
from pydantic import ValidationError

from models.llama.config import LlamaConfig
from tests.refusals import assert_refused

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 128,
}
SCALING = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_head_dim_is_the_share_of_the_hidden_size_unless_it_is_set():
    assert LlamaConfig(**SIZES).head_size == 8
    assert LlamaConfig(**SIZES, head_dim=20).head_size == 20


def test_a_configuration_survives_its_own_dump():
    config = LlamaConfig(**SIZES, rope_scaling=SCALING, qkv_bias=True)
    assert LlamaConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("size", sorted(SIZES))
def test_no_size_has_a_default(size):
    sizes = {name: value for name, value in SIZES.items() if name != size}
    with pytest.raises(ValidationError, match=f"{size}\n  Field required"):
        LlamaConfig(**sizes)


KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"num_kv_heads": 3}, ("num_heads", 4, "num_kv_heads=3", "num_kv_heads")),
        ({"num_heads": 6}, ("hidden_size", 32, "num_heads=6", "head_dim")),
        ({"head_dim": 7}, ("head_dim", 7, "rotary", "even")),
        (
            {"rope_scaling": SCALING | {"high_freq_factor": 1.0}},
            ("high_freq_factor", 1.0, "low_freq_factor=1.0", "4 and 1"),
        ),
        (
            {"rope_scaling": YARN | {"beta_fast": 1.0}},
            ("beta_fast", 1.0, "beta_slow=1.0", "32 and 1"),
        ),
        (
            {"rope_scaling": YARN, "rope_theta": 1.0},
            ("rope_theta", 1.0, "larger than 1", "10000"),
        ),
        ({"sliding_window": 128}, ("sliding_window", 128, "embeddings=128", "smaller")),
        (
            {"sliding_window": 8, "layer_types": ["full_attention"]},
            ("layer_types", 1, "num_layers=2", "every layer"),
        ),
        (
            {"sliding_window": 8, "layer_types": ["full_attention"] * 2},
            ("sliding_window", 8, "which have not", "leave layer_types out"),
        ),
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            ("sliding_window", None, "which have not", "leave layer_types out"),
        ),
        ({"hf_type": "phi3", "qk_norm": True}, ("qk_norm", True, "hf_type=phi3", "leave")),
        ({"hf_type": "mistral", "norm_after": True}, ("norm_after", True, "mistral", "leave")),
        ({"hf_type": "phi3", "rope_scaling": YARN}, ("rope_scaling", "yarn", "phi3", "leave")),
        (
            {"hf_type": "mistral", "sliding_window": 8, "layer_types": KINDS},
            ("layer_types", "full_attention", "hf_type=mistral", "hf_type=null"),
        ),
    ],
)
def test_what_cannot_be_built_is_refused(change, parts):
    with assert_refused(*parts):
        LlamaConfig(**(SIZES | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size\n  Input should be greater than 0"),
        ({"num_layers": True}, "num_layers\n  Input should be a valid integer"),
        ({"num_layers": 2.5}, "num_layers\n  Input should be a valid integer"),
        ({"rope_theta": float("inf")}, "rope_theta\n  Input should be a finite number"),
        ({"n_layers": 3}, "n_layers\n  Extra inputs are not permitted"),
        ({"rope_scaling": SCALING | {"type": "ntk"}}, "rope_scaling\n  Input tag 'ntk' found"),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, "factor\n  Input should be greater"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types.0\n  Input should be 'full_att"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        LlamaConfig(**(SIZES | change))


def test_the_tensor_axis_must_divide_heads_and_intermediate_size():
    assert LlamaConfig(**SIZES).tensor_divisible() == {
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
    }
