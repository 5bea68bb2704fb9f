from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.base import TokenInputs
from models.checkpoint import parameter_table
from models.hf.llama_names import decoder_settings
from models.llama.config import LlamaConfig
from models.llama.hf import HF
from models.llama.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.models.llama.test_config import SCALING, SIZES, YARN
from tests.refusals import assert_refused

GEMMA = {
    "activation": "gelu_tanh", "zero_centered_gamma": True, "scale_embeddings": True,
    "tie_embeddings": True, "rms_norm_eps": 1e-6,
}  # fmt: skip
SHAPES = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "one_kv_head": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 20},
    "llama3_scaling": {"rope_theta": 5e5, "rope_scaling": SCALING},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "qwen2_tied": {"qkv_bias": True, "tie_embeddings": True, "head_dim": 12},
    "qwen2_window": {
        "qkv_bias": True, "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"qk_norm": True, "head_dim": 20, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "qwen3_window": {
        "qk_norm": True, "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral_window": {"sliding_window": 16, "head_dim": 12},
    "mistral_heads": {"num_heads": 6, "head_dim": 8},  # which LlamaConfig refuses
    "ministral": {
        "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"],
    },
    "mistral_named": {"hf_type": "mistral"},
    "ministral_named": {"hf_type": "ministral", "sliding_window": 16, "head_dim": 12},
    "ministral_without_window": {"hf_type": "ministral"},
    "phi3": {"hf_type": "phi3", "num_kv_heads": 1},
    "phi3_window": {"hf_type": "phi3", "sliding_window": 16, "head_dim": 12},
    "olmo2": {"norm_after": True, "qk_norm": "all_heads", "rope_theta": 5e5},
    "olmo2_yarn": {
        "norm_after": True, "qk_norm": "all_heads", "rope_scaling": YARN, "tie_embeddings": True,
    },
    "gemma": GEMMA | {"head_dim": 20, "num_kv_heads": 1},
    "gemma_untied": GEMMA | {"tie_embeddings": False, "rope_scaling": SCALING},
    "linear_scaling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "qwen3_yarn": {
        "qk_norm": True, "rope_theta": 1e6,
        "rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "truncate": False},
    },
}  # fmt: skip


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


def _parts(tensors: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Tensors of theirs by name, those that hold the rows of several as one for each."""
    parts = dict(tensors)
    table = parameter_table(FAMILY, config)
    rows = {theirs: table[ours].shape[0] for ours, theirs in HF.names(config).items()}
    for whole, names in HF.fused(config).items():
        split = parts.pop(whole).split([rows[name] for name in names])
        parts |= dict(zip(names, split, strict=True))
    return parts


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_equal_those_of_transformers(shape):
    config = _config(shape)
    theirs = _theirs(config)
    ours = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single())
    names = HF.names(config)
    parameters = _parts(dict(theirs.named_parameters()), config)
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
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = _parts(gradients, config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[names[name]], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [
        "llama3_scaling",
        "yarn",
        "linear_scaling",
        "qwen3_window",
        "olmo2_yarn",
        "gemma_untied",
        "phi3",
    ],
)
def test_greedy_text_goes_on_like_that_of_transformers_beyond_the_original_context(shape):
    config = _config(shape).model_copy(update={"max_position_embeddings": 256})
    theirs = _theirs(config).double()
    ours = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).double().eval()
    names, parameters = HF.names(config), _parts(dict(theirs.named_parameters()), config)
    for name, parameter in ours.named_parameters():
        parameter.copy_(parameters[names[name]])
    prompt = torch.randint(0, config.vocab_size, (1, 20))
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=200, eos_token_id=None)
    text, cache, new = prompt, ours.new_cache(1, 220), prompt
    for _ in range(200):
        new = ours(TokenInputs(new), cache)[-1].argmax(-1, keepdim=True)
        text = torch.cat((text, new), dim=1)
    assert len(text.unique()) > 10
    assert torch.equal(text, expected)


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
        ({"is_causal": False}, False, "True"),  # models that embed texts
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic'",
            ("default", "linear", "yarn", "llama3"),
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            0.5,
            "whole heads",
        ),
    ],
)
def test_a_setting_that_the_family_lacks_is_refused(change, value, allowed):
    contents = HF.to_config(_config("llama")) | {"rope_scaling": None} | change
    (setting,) = change
    remedy = "train on without it" if setting == "attention_dropout" else "cannot be imported"
    with assert_refused(setting, value=value, constraint=allowed, remedy=remedy):
        HF.from_config(contents)


@pytest.mark.parametrize(
    ("change", "value", "constraint", "remedy"),
    [
        ({"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'", "llama", "imported"),
        ({"layer_types": ["sliding_attention"] * 2}, "'sliding_attention'", "sliding_window", "or"),
    ],
)
def test_a_type_of_layer_that_cannot_be_built_is_refused(change, value, constraint, remedy):
    contents = HF.to_config(_config("qwen3")) | change
    with assert_refused("layer_types", value=value, constraint=constraint, remedy=remedy):
        HF.from_config(contents)


WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


@pytest.mark.parametrize("shape", ["qwen2_window", "qwen3_window", "mistral_window", "ministral"])
def test_sliding_windows_are_refused_for_families_without_them(shape):
    with assert_refused(
        "sliding_window",
        value=SHAPES[shape]["sliding_window"],
        constraint=("max_position_embeddings=128", "mod"),
        remedy="cannot be imported",
    ):
        decoder_settings(HF.to_config(_config(shape)), family="mod")


def test_windows_of_the_last_layers_are_read_from_older_files():
    contents = HF.to_config(_config("qwen2_window"))
    del contents["layer_types"]
    assert HF.from_config(contents) == _config("qwen2_window")


def test_yarn_in_the_spelling_of_deepseek_is_read():
    contents = HF.to_config(_config("yarn"))
    spelled = {"mscale": 1.0, "mscale_all_dim": 0.5}
    del contents["rope_scaling"]
    contents["rope_parameters"] = contents["rope_parameters"] | spelled
    scaling = HF.from_config(contents).rope_scaling
    theirs = transformers.AutoConfig.for_model(**contents)
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    assert scaling.attention_factor == pytest.approx(factor, rel=1e-12)


LINEAR = {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4}
BY_ONE = {"rope_type": "yarn", "original_max_position_embeddings": 16, "attention_factor": 1.0}


def _older(**scaling: object) -> dict[str, object]:
    """Scaling as files of transformers 4 write it, those of Qwen2.5 among them."""
    return {"rope_parameters": None, "rope_scaling": scaling}


_NULL = {"rope_type": "yarn"} | {
    name: None if name == "truncate" else value
    for name, value in SHAPES["qwen3_yarn"]["rope_scaling"].items()
    if name != "type"
}

# What transformers computes as the same function: a shape, and what its config.json says otherwise.
SPELLINGS = {
    "swish": ("llama", {"hidden_act": "swish"}),
    "positions divided by 1": ("llama", {"rope_parameters": LINEAR, "rope_scaling": None}),
    "YaRN divided by 1": ("llama", {"rope_parameters": LINEAR | BY_ONE, "rope_scaling": None}),
    "a bias that Qwen2 does not ask for": ("qwen2", {"attention_bias": True, "mlp_bias": True}),
    "a window in no layer": ("qwen2", WINDOW | {"max_window_layers": 2}),
    "a window over everything": ("qwen2", WINDOW | {"sliding_window": 256}),
    "YaRN by type": ("yarn", _older(type="yarn", factor=4, original_max_position_embeddings=32)),
    "linear by type": ("linear_scaling", _older(type="linear", factor=4)),
    "Llama with a window that it does not read": (
        "llama",
        {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "Mistral with types of layers, which is Ministral": ("ministral", {"model_type": "mistral"}),
    "YaRN with the length beside it": (
        "yarn",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
            "rope_scaling": None,
            "original_max_position_embeddings": 32,
        },
    ),
    "YaRN with truncate: null, which is false": (
        "qwen3_yarn",
        {"rope_parameters": None, "rope_scaling": _NULL},
    ),
    "Mistral": ("mistral_named", {"sliding_window": None}),
    "Mistral with a window over everything": ("mistral_named", {"sliding_window": 256}),
    "Gemma that says that it is causal": ("gemma", {"use_bidirectional_attention": False}),
}


@torch.no_grad()
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_function_under_another_spelling_is_read(spelling, tmp_path):
    shape, change = SPELLINGS[spelling]
    contents = HF.to_config(_config(shape)) | change
    contents.pop("architectures")
    assert HF.from_config(contents) == _config(shape)
    (tmp_path / "config.json").write_text(json.dumps(contents))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path)
    ).eval()
    ours = SequentialModel(FAMILY.layer_specs(_config(shape)), ParallelContext.single())
    names = HF.names(_config(shape))
    parameters = _parts(dict(theirs.named_parameters()), _config(shape))
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


def test_a_shape_that_transformers_has_no_model_for_cannot_be_exported():
    config = LlamaConfig(**SIZES, qk_norm=True, qkv_bias=True)
    with assert_refused("qk_norm", value=True, constraint="Qwen3", remedy="change"):
        HF.to_config(config)


@pytest.mark.parametrize(
    ("change", "name", "value", "constraint"),
    [
        ({"factor": 0.5}, "factor", 0.5, "greater than 1"),
        ({"beta_fast": 0.5}, "beta_fast", 0.5, "larger than beta_slow=1.0"),
        ({"original_max_position_embeddings": 32.5}, "original_max", 32.5, "integer"),
    ],
)
def test_a_value_that_a_scaling_cannot_have_is_refused_by_name(change, name, value, constraint):
    contents = HF.to_config(_config("yarn")) | {"rope_scaling": None}
    contents["rope_parameters"] = contents["rope_parameters"] | change
    where = (constraint, "rope_parameters with rope_type='yarn'")
    with assert_refused(name, value=value, constraint=where, remedy="there"):
        HF.from_config(contents)
