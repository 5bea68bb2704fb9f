from __future__ import annotations

import pytest

from models.amrpa import AMRPAConfig, resolve_targets
from models.amrpa.targets import plan_memory, targets_by_stack, window_size
from tests.refusals import assert_refused

PUBLISHED = {
    "memory_decay": 0.9, "memory_noise": 0.001, "adaptive_window": True, "max_window_size": 4,
    "gate_sensitivity": 2.0, "gate_bias": -0.25, "gate_activation": "sigmoid",
    "alpha_temperature": 0.25, "alpha_mlp_hidden": 384, "alpha_mlp_layers": 2,
    "target_layers": "last_4", "freeze_base_model": True, "freeze_embeddings": True,
    "dropout": 0.2, "diversity_weight": 0.005, "gate_reg_weight": 0.05, "track_metrics": True,
    "metric_device": "cpu",
}  # fmt: skip


def test_names_and_defaults_are_the_published_ones():
    settings = AMRPAConfig().to_dict()
    assert {name: settings[name] for name in PUBLISHED} == PUBLISHED


def test_settings_survive_their_dict():
    config = AMRPAConfig(memory_decay=0.95, target_layers=[1, 2], history_kind="context")
    assert AMRPAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory_decya": 0.9}, "'memory_decya' .*'memory_decay'"),
        ({"memory_decay": 1.5}, "memory_decay=1.5 of AMRPAConfig is invalid: "),
        ({"gate_activation": "gelu"}, "gate_activation='gelu' of AMRPAConfig is invalid: "),
        ({"alpha_mlp_layers": 0}, "alpha_mlp_layers=0 of AMRPAConfig is invalid: "),
        ({"target_layers": 3}, "target_layers=3 of AMRPAConfig is invalid: .*string or .*list"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_one_line(values, message):
    for make in (AMRPAConfig.from_dict, lambda settings: AMRPAConfig(**settings)):
        with pytest.raises(ValueError, match=message) as error:
            make(values)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [[], "qk", 5])
def test_settings_that_are_no_mapping_are_refused(settings):
    with assert_refused("amrpa_config", repr(settings), "mapping", "to_dict"):
        AMRPAConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all", list(range(12))),
        ("last_4", [8, 9, 10, 11]),
        ("first_3", [0, 1, 2]),
        ("middle_6", [3, 4, 5, 6, 7, 8]),
        ("middle_5", [3, 4, 5, 6, 7]),
        ("last_99", list(range(12))),
        ("6:10", [6, 7, 8, 9]),
        ("-2:", [10, 11]),
        ("1::4", [1, 5, 9]),
        ("::-5", [1, 6, 11]),
        ([11, 8, 8], [8, 11]),
    ],
)
def test_targets(targets, layers):
    assert resolve_targets(targets, 12) == layers


@pytest.mark.parametrize(
    ("targets", "constraint", "remedy"),
    [
        ("last_0", "12 layers", "choose"),
        ("12:20", "12 layers", "choose"),
        ("5:2", "12 layers", "choose"),
        ("1:9:0", "step 0", "step"),
        ("last4", "understood", ("'all'", "'first_N'")),
        ("", "understood", ("'all'", "'first_N'")),
        ([], "", "one"),
        ([3, 12], "0 to 11", "remove 12"),
        ([-1], "0 to 11", "remove -1"),
        ([True], "0 to 11", "remove True"),
    ],
)
def test_targets_that_name_no_layer_are_refused(targets, constraint, remedy):
    with assert_refused("target_layers", repr(targets), constraint, remedy):
        resolve_targets(targets, 12)


def test_a_prefix_names_one_stack_and_none_names_all():
    sizes = {"encoder": 4, "decoder": 12}
    assert targets_by_stack("last_2", sizes) == {"encoder": [2, 3], "decoder": [10, 11]}
    assert targets_by_stack("encoder:last_2", sizes) == {"encoder": [2, 3]}
    assert targets_by_stack("decoder:6:10", sizes) == {"decoder": [6, 7, 8, 9]}
    with assert_refused(
        "target_layers",
        value="'decoder:last_2'",
        constraint=("'decoder'", "encoder"),
        remedy="name",
    ):
        targets_by_stack("decoder:last_2", {"encoder": 4})
    with assert_refused("target_layers", "'encoder:'", "none of its layers", "'all'"):
        targets_by_stack("encoder:", sizes)


def test_windows_grow_with_the_logarithm_of_depth():
    config = AMRPAConfig(max_window_size=9)
    widths = [window_size(layer, config) for layer in range(1, 12)]
    assert widths == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    fixed = AMRPAConfig(adaptive_window=False, max_window_size=3)
    assert [window_size(layer, fixed) for layer in range(1, 7)] == [0, 1, 2, 3, 3, 3]
    assert window_size(20, AMRPAConfig(max_window_size=2)) == 2


def test_a_layer_reads_the_nearest_earlier_layers_of_its_type():
    types = ["local", "local", "full", "local", "local", "full", "local"]
    plan = plan_memory([0, 2, 5, 6], AMRPAConfig(), types)
    assert plan.reads == {5: (2,), 6: (4, 3, 1)}
    assert plan.recorded == {1, 2, 3, 4}
    targets = AMRPAConfig(history_scope="targets")
    assert plan_memory([1, 4, 6], targets, ["full"] * 7).reads == {4: (1,), 6: (4, 1)}


def test_targets_without_an_earlier_layer_are_refused():
    with assert_refused("target_layers", value=[0], constraint="earlier", remedy="deeper"):
        plan_memory([0], AMRPAConfig(target_layers=[0]), ["full"] * 4)
