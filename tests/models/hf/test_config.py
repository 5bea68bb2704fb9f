"""Configurations that are derived from the settings of a family."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel

from models.common.config import STRICT, DecoderConfig, Llama3Scaling, YarnScaling
from models.hf.config import FamilyPreTrainedConfig
from models.hf.decoder_config import DecoderPreTrainedConfig
from tests.refusals import assert_refused


class OtherConfig(BaseModel):
    model_config = STRICT

    family: Literal["other"] = "other"
    vocab_size: int = 61
    hidden_dim: int = 32
    num_layers: int = 2
    max_seq_len: int = 64
    kind: Literal["even", "odd"] = "even"


class StretchedConfig(DecoderConfig):
    family: Literal["stretched"] = "stretched"
    stretch: float = 2.0


ALIASES = {"hidden_size": "hidden_dim", "max_position_embeddings": "max_seq_len"}


def test_settings_keep_their_names_and_have_those_that_transformers_asks_for():
    derived = FamilyPreTrainedConfig.of(OtherConfig, ALIASES)
    assert (derived.__name__, derived.model_type) == ("OtherHFConfig", "other")
    assert derived.model_class == "OtherForCausalLM"
    theirs = derived(hidden_dim=48, kind="odd")
    assert (theirs.hidden_size, theirs.num_hidden_layers) == (48, 2)
    assert theirs.max_position_embeddings == 64
    assert theirs.settings() == OtherConfig(hidden_dim=48, kind="odd")
    contents = theirs.to_diff_dict()
    assert contents["hidden_dim"] == 48
    assert derived(**contents).settings() == theirs.settings()


def test_a_name_that_transformers_asks_for_and_nothing_has_is_refused():
    with assert_refused("OtherConfig", "hidden_size", "transformers", "aliases={'hidden_size'"):
        FamilyPreTrainedConfig.of(OtherConfig)


@pytest.mark.parametrize("head_dim", [None, 16])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_decoder_has_its_sizes_under_the_names_of_llama(head_dim, scaled):
    scaling = Llama3Scaling(
        type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )  # fmt: skip
    settings = StretchedConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        max_position_embeddings=128,
        rope_theta=5e5,
        rope_scaling=scaling if scaled else None,
        stretch=3.0,
    )
    derived = DecoderPreTrainedConfig.of(StretchedConfig)
    theirs = derived.from_settings(settings)
    assert theirs.num_hidden_layers == 3
    assert (theirs.stretch, theirs.num_kv_heads) == (3.0, 2)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.settings() == settings
    assert derived(**theirs.to_diff_dict()).settings() == settings


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3,
    "num_heads": 4, "num_kv_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "theta"),
    [
        ({"rope_parameters": YARN}, 1e4),
        ({"rope_parameters": YARN, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": YARN | {"rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": YARN, "rope_theta": 5e5}, 5e5),
        ({"rope_scaling": {**YARN, "type": "yarn"}, "rope_parameters": YARN}, 1e4),
        ({"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in YARN.items()}}, 1e4),
    ],
)
def test_scaled_frequencies_may_be_given_as_transformers_takes_them(given, theta):
    derived = DecoderPreTrainedConfig.of(StretchedConfig)
    settings = derived(**SIZES, **given).settings()
    assert settings.rope_theta == theta
    assert settings.rope_scaling == YarnScaling(
        type="yarn", factor=4.0, original_max_position_embeddings=32
    )


def test_two_scalings_are_refused():
    derived = DecoderPreTrainedConfig.of(StretchedConfig)
    other = {"type": "linear", "factor": 2.0}
    with assert_refused("rope_scaling", value=other, constraint="rope_parameters", remedy="leave"):
        derived(**SIZES, rope_parameters=YARN, rope_scaling=other)
