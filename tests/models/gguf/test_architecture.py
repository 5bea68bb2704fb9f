from __future__ import annotations

import math

import pytest
import torch

from models.gguf.architecture import architecture_of, decoder_names
from models.gguf.weights import gguf_name, in_pairs
from models.llama.model import FAMILY
from models.registry import get_family
from tests.models.checkpoints import config
from tests.models.gguf.shapes import SHAPES
from tests.models.llama.test_config import SCALING, YARN
from tests.refusals import assert_refused


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_has_a_name_of_its_own(shape):
    case = SHAPES[shape]
    names = decoder_names(case.family_of(), case.config)
    found = [gguf_name(theirs) for theirs in names.values()]
    assert len(set(found)) == len(found)
    assert architecture_of(case.config).name == case.architecture


def test_names_are_those_of_the_package():
    """As its table has them; the tables of the package itself are in a test with the package."""
    names = decoder_names(FAMILY, config(qk_norm=True, qkv_bias=True, num_layers=1))
    assert [gguf_name(theirs) for theirs in names.values()] == [
        "token_embd.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.attn_v.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_norm.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_up.weight",
        "blk.0.ffn_down.weight",
        "blk.0.attn_q.bias",
        "blk.0.attn_k.bias",
        "blk.0.attn_v.bias",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_k_norm.weight",
        "output_norm.weight",
        "output.weight",
    ]


def test_rows_of_heads_are_put_in_pairs():
    rows = torch.arange(12.0)
    assert in_pairs(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = torch.randn(12, 5)
    assert torch.equal(in_pairs(matrix, 2), matrix[in_pairs(rows, 2).long()])


def test_settings_say_what_a_graph_reads():
    found = architecture_of(config(head_dim=12, rope_theta=5e5, qk_norm=True)).settings
    assert found["qwen3.attention.key_length"] == found["qwen3.rope.dimension_count"] == 12
    assert found["qwen3.context_length"] == 256
    assert found["qwen3.rope.freq_base"] == 5e5
    assert not any("scaling" in key for key in found)


def test_factors_divide_frequencies_where_settings_cannot_say_it():
    found = architecture_of(config(rope_theta=5e5, rope_scaling=SCALING))
    assert found.factors is not None
    assert found.factors[0] == 1  # turns often
    assert found.factors[-1] == SCALING["factor"]
    assert "llama.rope.scaling.factor" not in found.settings
    yarn = architecture_of(config(rope_scaling=YARN | {"beta_slow": 0.1}))
    assert yarn.factors is not None
    assert yarn.settings["llama.rope.scaling.attn_factor"] == pytest.approx(0.1 * math.log(4) + 1)


def test_what_llama_cpp_multiplies_by_itself_is_taken_out():
    usual = architecture_of(config(rope_scaling=YARN))
    assert usual.factors is None
    assert "llama.rope.scaling.attn_factor" not in usual.settings
    own = architecture_of(config(rope_scaling=YARN | {"attention_factor": 1.3})).settings
    assert own["llama.rope.scaling.attn_factor"] == pytest.approx(1.3 / (0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("changes", "setting", "value", "constraint"),
    [
        ({"num_layers": 513}, "num_layers", 513, "512"),
        ({"sliding_window": 16}, "sliding_window", 16, "every earlier position"),
        ({"qk_norm": "all_heads"}, "qk_norm", "all_heads", "qk_norm=True"),
        ({"norm_after": True}, "norm_after", True, "norm_after=False"),
        ({"activation": "gelu_tanh"}, "activation", "gelu_tanh", "silu"),
        ({"zero_centered_gamma": True}, "zero_centered_gamma", True, "False"),
        ({"scale_embeddings": True}, "scale_embeddings", True, "False"),
        ({"qk_norm": True, "rope_scaling": SCALING}, "rope_scaling", "llama3", "qwen3"),
        (
            {"qk_norm": True, "rope_scaling": YARN | {"beta_slow": 0.1}},
            "rope_scaling",
            0.1,
            ("qk_norm=True", "beta_slow=1"),
        ),
    ],
)
def test_a_function_that_no_graph_computes_is_refused(changes, setting, value, constraint):
    with assert_refused(setting, value=value, constraint=constraint, remedy="to-hf"):
        architecture_of(config(**changes))


@pytest.mark.parametrize("family", ["agiformer", "amrpa", "daria_former", "dart"])
def test_a_family_that_llama_cpp_does_not_have_is_refused(family):
    with assert_refused("model.family", value=family, constraint="llama.cpp", remedy="to-hf"):
        decoder_names(get_family(family), object())


@pytest.mark.parametrize("family", ["dtf", "mod"])
@pytest.mark.parametrize(
    ("setting", "value", "constraint"),
    [("capacity_gamma", 0.5, "only at 1"), ("num_experts", 4, "one feed-forward part")],
)
def test_routed_layers_and_experts_are_refused(family, setting, value, constraint):
    of = SHAPES[family].config.model_copy(update={setting: value})
    with assert_refused(setting, value=value, constraint=constraint, remedy="to-hf"):
        decoder_names(get_family(family), of)
