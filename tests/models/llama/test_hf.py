from __future__ import annotations

from dataclasses import fields
from functools import partial

import pytest
import torch
import transformers

from models.base import TokenInputs
from models.checkpoint import parameter_table
from models.llama.config import LlamaConfig
from models.llama.hf import HF
from models.llama.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.models.llama.test_config import SCALING, SIZES
from tests.refusals import assert_refused

SHAPES = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "one_kv_head": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 20},
    "llama3_scaling": {"rope_theta": 5e5, "rope_scaling": SCALING},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "qwen2_tied": {"qkv_bias": True, "tie_embeddings": True, "head_dim": 12},
}


def _config(shape: str) -> LlamaConfig:
    return LlamaConfig(**(SIZES | SHAPES[shape]))


def _theirs(config: LlamaConfig) -> transformers.PreTrainedModel:
    """A randomly initialised model of transformers, every parameter away from its start."""
    contents = HF.to_config(config)
    kind = getattr(transformers, contents["architectures"][0])
    torch.manual_seed(0)
    model = kind(kind.config_class.from_dict(contents)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_equal_those_of_transformers(shape):
    config = _config(shape)
    theirs = _theirs(config)
    ours = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single())
    names = HF.names(config)
    parameters = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(names)
    assert set(parameters) == set(names.values())
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(parameters[names[name]])

    tokens = torch.randint(0, config.vocab_size, (2, 100))
    labels = torch.randint(0, config.vocab_size, (2, 100))
    labels[0, 60:] = -100
    logits = ours(TokenInputs(tokens))
    total = FAMILY.loss(logits, labels, config=config, ctx=ours.ctx).total
    expected = theirs(tokens, labels=labels, shift_labels=labels)
    torch.testing.assert_close(logits.transpose(0, 1), expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, expected.loss, rtol=1e-6, atol=0.0)
    total.backward()
    expected.loss.backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, parameters[names[name]].grad, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_names_cover_every_parameter_once(shape):
    config = _config(shape)
    names = HF.names(config)
    assert set(names) == set(parameter_table(FAMILY, config))
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_configuration_survives_the_way_through_config_json(shape, tmp_path):
    config = _config(shape)
    contents = HF.to_config(config)
    assert HF.from_config(contents) == config
    # And through the file that transformers itself writes.
    transformers.AutoConfig.for_model(**contents).save_pretrained(tmp_path)
    saved, _ = transformers.PreTrainedConfig.get_config_dict(tmp_path)
    assert HF.from_config(saved) == config


def test_config_json_of_older_transformers_is_read():
    contents = HF.to_config(_config("llama3_scaling"))
    del contents["rope_parameters"]
    assert HF.from_config(contents) == _config("llama3_scaling")


@pytest.mark.parametrize(
    ("change", "value", "allowed"),
    [
        ({"hidden_act": "gelu"}, "'gelu'", "'silu'"),
        ({"attention_bias": True}, True, "False"),
        ({"mlp_bias": True}, True, "False"),
        ({"attention_dropout": 0.1}, 0.1, "0.0"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "'linear'",
            ("default", "llama3"),
        ),
    ],
)
def test_a_setting_that_the_family_lacks_is_refused(change, value, allowed):
    contents = HF.to_config(_config("llama")) | {"rope_scaling": None} | change
    (setting,) = change
    remedy = "train on without it" if setting == "attention_dropout" else "cannot be imported"
    with assert_refused(setting, value=value, constraint=allowed, remedy=remedy):
        HF.from_config(contents)


WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


def test_sliding_windows_are_refused():
    contents = HF.to_config(_config("qwen2")) | WINDOW
    refused = partial(
        assert_refused,
        "sliding_window",
        value=16,
        constraint="max_position_embeddings=128",
        remedy="cannot be imported",
    )
    with refused():
        HF.from_config(contents)
    mistral = HF.to_config(_config("llama")) | {"model_type": "mistral", "sliding_window": 16}
    with refused():
        HF.from_config(mistral)


LINEAR = {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4}
# What transformers computes as the same function: a shape, and what its config.json says otherwise.
SPELLINGS = {
    "swish": ("llama", {"hidden_act": "swish"}),
    "positions divided by 1": ("llama", {"rope_parameters": LINEAR, "rope_scaling": None}),
    "a bias that Qwen2 does not ask for": ("qwen2", {"attention_bias": True, "mlp_bias": True}),
    "a window in no layer": ("qwen2", WINDOW | {"max_window_layers": 2}),
    "a window over everything": ("qwen2", WINDOW | {"sliding_window": 256}),
    "Mistral": ("llama", {"model_type": "mistral", "sliding_window": None}),
    "Mistral with a window over everything": (
        "head_dim",
        {"model_type": "mistral", "sliding_window": 256},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_function_under_another_spelling_is_read(spelling):
    shape, change = SPELLINGS[spelling]
    contents = HF.to_config(_config(shape)) | change
    contents.pop("architectures")
    assert HF.from_config(contents) == _config(shape)
    kind, settings = (
        contents["model_type"],
        {k: v for k, v in contents.items() if k != "model_type"},
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **settings)
    ).eval()
    ours = SequentialModel(FAMILY.layer_specs(_config(shape)), ParallelContext.single())
    names, parameters = HF.names(_config(shape)), dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        parameter.copy_(parameters[names[name]])
    tokens = torch.randint(0, 61, (2, 100))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(TokenInputs(tokens)).transpose(0, 1), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_config_json_says_whatever_transformers_has_a_default_for(shape):
    contents = HF.to_config(_config(shape))
    kind = type(transformers.AutoConfig.for_model(**contents))
    general = {field.name for field in fields(transformers.PreTrainedConfig)}
    own = {field.name for field in fields(kind)} - general
    # The tokens are those of the exported tokenizer; the others change nothing that is computed.
    elsewhere = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert own - set(contents) - elsewhere <= {"use_cache", "pretraining_tp", "layer_types"}


def test_a_shape_that_transformers_refuses_cannot_be_exported():
    config = LlamaConfig(**(SIZES | {"num_heads": 6}), head_dim=8)
    with assert_refused(
        "hidden_size", value=32, constraint=("num_heads=6", "LlamaConfig"), remedy="num_heads"
    ):
        HF.to_config(config)
