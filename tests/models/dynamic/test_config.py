from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from models.dynamic.config import DTFConfig, MoDConfig
from models.registry import get_config_class
from tests.models.dynamic.cases import VARIANTS, config_of
from tests.refusals import assert_refused


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_survives_its_own_dump(variant):
    family, changes = VARIANTS[variant]
    config = config_of(family, **changes)
    assert get_config_class(family).model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("family", "change", "parts"),
    [
        ("mod", {"mod_offset": 2}, ("mod_offset", 2, "mod_every=2", "mod_offset")),
        ("mod", {"num_layers": 1}, ("num_layers", 1, "mod_offset=1", "mod_offset")),
        ("dtf", {"num_layers": 1}, ("num_layers", 1, "pair", "2 or more")),
        (
            "dtf",
            {"prior_ffn_intermediate_size_factor": 0.01},
            ("prior_ffn_intermediate_size_factor", 0.01, "hidden_size=32", "larger"),
        ),
        (
            "dtf",
            {"causal_router": "aux"},
            ("causal_router", "aux", "router_score=vpr", "router_score=linear"),
        ),
        (
            "mod",
            {"causal_router": "aux", "router_score": "random"},
            ("causal_router", "aux", "router_score=random", "router_score=linear"),
        ),
        ("mod", {"num_kv_heads": 3}, ("num_heads", 4, "num_kv_heads=3", "num_kv_heads")),
    ],
)
def test_what_cannot_be_built_is_refused(family, change, parts):
    with assert_refused(*parts):
        config_of(family, **change)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mod", {"capacity_gamma": 0.0}, "capacity_gamma\n  Input should be greater than 0"),
        ("dtf", {"capacity_gamma": 1.5}, "capacity_gamma\n  Input should be less than or equal"),
        ("mod", {"capacity_multiple": 0}, "capacity_multiple\n  Input should be greater than 0"),
        ("mod", {"router_score": "vpr"}, "router_score\n  Input should be 'linear' or 'random'"),
        ("mod", {"gate_fn": "value"}, "gate_fn\n  Input should be 'sigmoid', 'raw' or 'st'"),
        ("dtf", {"ce_criterion_offset_init": 0.0}, "ce_criterion_offset_init\n  Input should be"),
        ("dtf", {"ma_window": 0}, "ma_window\n  Input should be greater than 0"),
        ("dtf", {"tau_momentum": 1.0}, "tau_momentum\n  Input should be less than 1"),
        ("mod", {"causal_threshold": 1.0}, "causal_threshold\n  Input should be less than 1"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(family, change, message):
    with pytest.raises(ValidationError, match=message):
        config_of(family, **change)


def test_routed_layers_are_every_other_one_after_the_first():
    config = config_of("mod", num_layers=5)
    assert [config.is_routed_layer(i) for i in range(5)] == [False, True, False, True, False]
    assert config.num_routed == 2
    assert config_of("mod", capacity_gamma=1.0).num_routed == 0
    assert config_of("dtf", num_layers=5).num_pairs == config_of("dtf").num_pairs == 2


def test_the_tensor_axis_must_divide_the_prior_where_there_is_one():
    assert config_of("dtf").tensor_divisible()["prior_ffn_intermediate_size"] == 8
    linear = config_of("dtf", router_score="linear").tensor_divisible()
    assert linear == config_of("mod").tensor_divisible()


def test_the_configurations_need_no_torch():
    program = "import sys, models.dynamic.config as c; c.MoDConfig, c.DTFConfig; "
    program += "print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
    assert {MoDConfig, DTFConfig} == {get_config_class("mod"), get_config_class("dtf")}
