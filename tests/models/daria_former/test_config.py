from __future__ import annotations

import pytest
from pydantic import ValidationError

from models.daria_former.config import DariaFormerConfig
from models.daria_former.counts import num_parameters
from tests.refusals import assert_refused

# What the published table and ours promise, in parameters.
PROMISED = {
    "small": 121.3e6,
    "base": 351.9e6,
    "large": 1.34e9,
    "b7": 7.84e9,
    "b13": 14.1e9,
    "b70": 73.6e9,
}


@pytest.mark.parametrize(("preset", "promised"), PROMISED.items())
def test_every_preset_has_the_parameters_that_are_promised(preset, promised):
    config = getattr(DariaFormerConfig, preset)()
    assert num_parameters(config) == pytest.approx(promised, rel=0.01)


def test_published_contexts_and_widths():
    table = {"small": (12, 768, 12, 8192), "base": (24, 1024, 16, 16_384)}
    for preset, sizes in (table | {"large": (24, 2048, 32, 32_768)}).items():
        config = getattr(DariaFormerConfig, preset)()
        found = (config.num_layers, config.hidden_dim, config.num_heads, config.max_seq_len)
        assert found == sizes


def test_a_preset_takes_changes_and_a_configuration_survives_its_own_dump():
    config = DariaFormerConfig.base(image_enabled=True, paths=("long", "local"), rhythm_rank=0)
    assert (config.num_layers, config.image_enabled) == (24, True)
    assert config.all_paths == ("local", "long", "modality")
    assert DariaFormerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"num_kv_heads": 5}, ("num_heads", 12, "num_kv_heads=5", "num_kv_heads")),
        ({"num_heads": 10, "num_kv_heads": 5}, ("hidden_dim", 768, "num_heads=10", "head_dim")),
        ({"head_dim": 7}, ("head_dim", 7, ("even", "4"), ("head_dim", "num_heads"))),
        ({"head_dim": 2}, ("head_dim", 2, ("even", "4"), ("head_dim", "num_heads"))),
        ({"working_stride": 5}, ("segment_len", 64, "working_stride=5", "change")),
        ({"episodic_stride": 128}, ("segment_len", 64, "episodic_stride=128", "change")),
        (
            {"working_memory_slots": 10, "episodic_memory_slots": 5, "persistent_memory_slots": 16},
            ("memory_top_k", 32, "31 slots", ("lower", "add")),
        ),
        (
            {"paths": ("memory", "persona")},
            ("paths", ["memory", "persona"], "recent", ("local", "long")),
        ),
        ({"paths": ("long", "long")}, ("paths", ["long", "long"], "twice", "once")),
        ({"esv_sites": 13}, ("esv_sites", 13, "num_layers=12", "one site per layer")),
        (
            {"lora_targets": ("q_proj", "qkv")},
            ("lora_targets", ["q_proj", "qkv"], "q_proj, k_proj", "correct"),
        ),
        ({"lora_targets": ()}, ("lora_targets", [], "q_proj, k_proj", "correct")),
        ({"lora_dropout": 0.1}, ("lora_dropout", 0.1, "lora_rank=0", ("rank", "remove"))),
        (
            {"image_enabled": True, "image_size": 220},
            ("image_size", 220, "image_patch_size=16", "change"),
        ),
    ],
)
def test_what_cannot_be_built_is_refused(change, parts):
    with assert_refused(*parts):
        DariaFormerConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window_size": 0}, "sliding_window_size\n  Input should be greater than 0"),
        ({"paths": ("modality",)}, "paths.0\n  Input should be 'local', 'long', 'memory' or"),
        ({"dropout": 1.0}, "dropout\n  Input should be less than 1"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor\n  Input should be greater than or"),
        ({"rope_base": float("nan")}, "rope_base\n  Input should be"),
        ({"num_layers": 2.0}, "num_layers\n  Input should be a valid integer"),
        ({"esv_mode": "lstm"}, "esv_mode\n  Input should be 'mingru' or 'gru'"),
        ({"hidden_size": 4}, "hidden_size\n  Extra inputs are not permitted"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        DariaFormerConfig(**change)


def test_memory_that_is_switched_off_needs_no_valid_sizes():
    DariaFormerConfig(paths=("local",), working_stride=5, memory_top_k=10_000)


def test_settings_change_until_a_model_is_built_and_a_bad_change_leaves_them_as_they_were():
    config = DariaFormerConfig.small()
    config.image_enabled = True
    config.audio_enabled = True
    assert config.all_paths[-1] == "modality"
    before = config.to_dict()
    for name, value in (("num_kv_heads", 5), ("memory_top_k", 10_000), ("num_layers", "3")):
        with pytest.raises(ValidationError):
            setattr(config, name, value)
        assert config.to_dict() == before
    with pytest.raises(ValidationError, match="no_such_setting"):
        config.no_such_setting = 1


@pytest.mark.parametrize("layers", [4, 7, 10, 80])
@pytest.mark.parametrize("sites", [1, 2, 3, 4])
def test_the_emotion_state_is_updated_as_often_as_set_evenly_and_after_the_last_layer(
    layers, sites
):
    config = DariaFormerConfig(num_layers=layers, esv_sites=sites)
    after = [layer + 1 for layer in range(layers) if config.has_update_site(layer)]
    assert len(after) == sites
    assert after[-1] == layers
    gaps = [b - a for a, b in zip([0, *after], after, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_the_tensor_axis_must_divide_heads_and_the_feed_forward_size():
    assert DariaFormerConfig.b70().tensor_divisible() == {
        "num_heads": 64,
        "num_kv_heads": 8,
        "ffn_hidden_dim": 26_624,
    }


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"hidden_dim": 768}, 2048),
        ({"hidden_dim": 64, "num_heads": 4}, 256),
        ({"hidden_dim": 768, "ffn_activation": "gelu"}, 3072),
        ({"hidden_dim": 768, "ffn_hidden_dim": 100}, 100),
    ],
)
def test_the_feed_forward_size_follows_from_the_width(settings, size):
    assert DariaFormerConfig(**settings).ffn_size == size
