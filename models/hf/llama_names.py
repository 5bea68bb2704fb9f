"""Decoders of Llama's shape in Hugging Face's names, for the families with one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from models.common.config import (
    DecoderConfig,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)

# Paths in our model -> their names.
EMBEDDING_NAME = ("embedding.tokens.weight", "model.embed_tokens.weight")
HEAD_NAME = ("head.output.weight", "lm_head.weight")
FINAL_NORM_NAME = ("head.norm.weight", "model.norm.weight")
# Paths in our block -> theirs in a layer.
BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
BLOCK_BIAS_NAMES = {
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.bias": "self_attn.v_proj.bias",
}
QK_NORM_NAMES = {
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
}
# Of blocks that normalise what attention and feed-forward layer return.
NORM_AFTER_NAMES = {
    "attention_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "post_feedforward_layernorm.weight",
}
# Their tensors in a layer that hold the rows of several others.
FUSED_NAMES = {
    "self_attn.qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj.weight": ("gate_proj", "up_proj"),
}
# Their buffers, which hold nothing learned.
DERIVED_NAMES = (
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\."
    r"(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)
# ours -> theirs, for settings that mean the same
SETTING_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_SCALINGS: dict[str, type[LinearScaling] | type[YarnScaling] | type[Llama3Scaling]] = {
    "linear": LinearScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "qkv_bias",
    "tie_embeddings",
)
# theirs -> the only value that our decoders can represent
FIXED_SETTINGS = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "use_bidirectional_attention": None,
    "is_causal": True,
}
# Of these, what is another training, not another function.
_DROPOUTS = {"attention_dropout", "resid_pdrop", "embd_pdrop"}
# The activation of model types whose activation is another one.
_ACTIVATIONS = {"gemma": "gelu_pytorch_tanh"}
# Of these, what transformers' attention reads of every configuration, a field of its class or not.
_ALWAYS_READ = {"is_causal"}
# Their types of layers that our decoders have.
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Their names of the activation silu.
_SILU = ("silu", "swish")


def decoder_names(
    config: DecoderConfig,
    *,
    block: str = "block_{}",
    qk_norm: bool = False,
    norm_after: bool = False,
) -> dict[str, str]:
    """Our parameter name -> theirs, in the order of the layers; a tied head has none of its own.

    `block`: the path of a block in our model, by its number. `qk_norm`: queries and keys have
    norms. `norm_after`: blocks normalise what attention and feed-forward layer return.
    """
    in_block = BLOCK_NAMES | (BLOCK_BIAS_NAMES if config.qkv_bias else {})
    in_block |= QK_NORM_NAMES if qk_norm else {}
    in_block |= NORM_AFTER_NAMES if norm_after else {}
    names = dict([EMBEDDING_NAME])
    for i in range(config.num_layers):
        names |= {
            f"{block.format(i)}.{ours}": f"model.layers.{i}.{theirs}"
            for ours, theirs in in_block.items()
        }
    last = [FINAL_NORM_NAME] if config.tie_embeddings else [FINAL_NORM_NAME, HEAD_NAME]
    return names | dict(last)


def fused_names(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Their tensors that hold the rows of several others -> those, in a model like Phi-3."""
    names = {}
    for layer in range(config.num_layers):
        for whole, parts in FUSED_NAMES.items():
            prefix = f"model.layers.{layer}.{whole.partition('.')[0]}."
            fused = f"model.layers.{layer}.{whole}"
            names[fused] = tuple(f"{prefix}{part}.weight" for part in parts)
    return names


def tied_names(config: DecoderConfig) -> dict[str, str]:
    """Their second name of a tied tensor -> the first."""
    return {HEAD_NAME[1]: EMBEDDING_NAME[1]} if config.tie_embeddings else {}


def decoder_contents(
    config: DecoderConfig, *, model_type: str, architecture: str
) -> dict[str, Any]:
    """The contents of config.json for this decoder, without windows, as a model of transformers."""
    contents: dict[str, Any] = {"model_type": model_type, "architectures": [architecture]}
    contents |= {theirs: getattr(config, ours) for ours, theirs in SETTING_NAMES.items()}
    activation = _ACTIVATIONS.get(model_type, FIXED_SETTINGS["hidden_act"])
    contents |= {"head_dim": config.head_size, "hidden_act": activation, "attention_dropout": 0.0}
    contents |= _own_contents(config, model_type)
    # transformers 5 reads rope_parameters; what reads the older format would use its default theta.
    rope = rope_parameters(config)
    older = {name: value for name, value in rope.items() if name != "rope_theta"}
    return contents | {
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else older,
    }


def _own_contents(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Settings of one model type only, written out because defaults may change."""
    if model_type == "llama":
        return {"attention_bias": False, "mlp_bias": False}
    # Their defaults are tokens of the original vocabularies, of which padding has no gradient.
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if model_type == "olmo2":
        return {"attention_bias": False} | no_tokens
    if model_type == "gemma":
        return {"attention_bias": False, "use_bidirectional_attention": None} | no_tokens
    if model_type in ("mistral", "ministral"):
        return {"sliding_window": None}
    if model_type == "phi3":
        own_length = {"original_max_position_embeddings": config.max_position_embeddings}
        own = {"sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return own | own_length | no_tokens
    layers = config.num_layers
    own = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": layers}
    return own | ({"attention_bias": False} if model_type == "qwen3" else {})


def decoder_settings(
    contents: Mapping[str, Any], *, family: str, windows: bool = False
) -> dict[str, Any]:
    """Settings of a `DecoderConfig` from the contents of a config.json of a model of Llama's shape;
    with `windows` also `sliding_window` and `layer_types`.

    Raises:
        ValueError: a setting that our decoders do not have; `family` is named.
    """
    from transformers import AutoConfig

    model_type, settings = contents["model_type"], dict(contents)
    del settings["model_type"]
    if model_type == "mistral" and "layer_types" in contents:  # as their Auto classes read it
        model_type = "ministral"
    theirs = AutoConfig.for_model(model_type, **settings)
    # As its layers do: a length beside the parameters replaces that in them.
    theirs.standardize_rope_params()
    _check_function(theirs, family=family)
    window, layer_types = _windows(theirs, family=family)
    if window is not None and not windows:
        raise ValueError(
            f"config.json: sliding_window={window} with max_position_embeddings="
            f"{theirs.max_position_embeddings}, the {family} family has no windows; such a model "
            "cannot be imported"
        )
    values = {ours: getattr(theirs, name) for ours, name in SETTING_NAMES.items()}
    head_dim = getattr(theirs, "head_dim", None)
    if head_dim is not None and head_dim * theirs.num_attention_heads != theirs.hidden_size:
        values["head_dim"] = head_dim
    rope = theirs.rope_parameters
    if windows:
        values |= {"sliding_window": window, "layer_types": layer_types}
    return values | {
        "qkv_bias": contents["model_type"] == "qwen2",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope_scaling(rope, family=family),
    }


def _check_function(theirs: Any, *, family: str) -> None:
    """Refuse a configuration of transformers whose function our decoders cannot compute.

    Only what its class reads counts: a Qwen2 model with the key `attention_bias` is a Qwen2 model.
    """
    read = _read_settings(theirs) | {name for name in _ALWAYS_READ if hasattr(theirs, name)}
    given = {name: getattr(theirs, name) for name in FIXED_SETTINGS if name in read}
    if given["hidden_act"] in _SILU:
        given["hidden_act"] = "silu"
    if given.get("use_bidirectional_attention") is False:
        del given["use_bidirectional_attention"]
    given.pop("use_sliding_window", None)
    activation = _ACTIVATIONS.get(theirs.model_type, FIXED_SETTINGS["hidden_act"])
    for name, value in given.items():
        allowed = activation if name == "hidden_act" else FIXED_SETTINGS[name]
        if value != allowed:
            remedy = "such a model cannot be imported"
            if name in _DROPOUTS:
                remedy = "change that there to train on without it"
            raise ValueError(
                f"config.json: {name}={value!r}, the {family} family only has {allowed!r}"
                f"{'' if allowed == FIXED_SETTINGS[name] else f' in {theirs.model_type}'}; {remedy}"
            )


def _read_settings(theirs: Any) -> set[str]:
    """The settings that the class of a configuration reads; it keeps any other key, too."""
    return {field.name for field in fields(theirs)}


def _windows(theirs: Any, *, family: str) -> tuple[int | None, list[str] | None]:
    """The window that any layer has, and the types of layers if not all have it.

    A window as long as the longest sequence hides nothing. Only what the class reads counts:
    Llama never has a window, whatever `layer_types` says.

    Raises:
        ValueError: a layer is of another type, or lacks the window that its type needs.
    """
    read = _read_settings(theirs)
    window = theirs.sliding_window if "sliding_window" in read else None
    kinds = list(theirs.layer_types if "layer_types" in read else [])
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            raise ValueError(
                f"config.json: layer_types names {kind!r}, the {family} family only has "
                f"{' and '.join(_LAYER_TYPES)}; such a model cannot be imported"
            )
    if window is None and _LAYER_TYPES[1] in kinds:
        raise ValueError(
            f"config.json: layer_types names {_LAYER_TYPES[1]!r}, but there is no window "
            "(use_sliding_window, sliding_window); set both there, or leave layer_types out"
        )
    if window is None or window >= theirs.max_position_embeddings:
        return None, None
    if kinds and _LAYER_TYPES[1] not in kinds:
        return None, None
    return window, kinds if len(set(kinds)) > 1 else None


def rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """The frequencies of rotary embeddings as transformers 5 writes them."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        own = scaling.model_dump(exclude={"type"}, exclude_none=True)
        rope = {"rope_type": scaling.type} | own
    return rope | {"rope_theta": config.rope_theta}


def rope_scaling(rope: Mapping[str, Any], *, family: str) -> RopeScaling | None:
    """The inverse of `rope_parameters`, without `rope_theta`.

    Raises:
        ValueError: a type that our decoders do not have, or a value that it cannot have.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    scales = kind == "yarn" and rope.get("attention_factor") not in (None, 1.0)
    if kind in ("linear", "yarn") and rope.get("factor") == 1.0 and not scales:  # divides by 1
        kind = "default"
    whole = rope.get("partial_rotary_factor", 1.0) == 1.0
    if kind == "default" and whole:
        return None
    # The frequencies of `dynamic` depend on the longest sequence that a model has seen so far.
    if kind not in _SCALINGS or not whole:
        raise ValueError(
            f"config.json: rope_parameters with rope_type={kind!r} and partial_rotary_factor="
            f"{rope.get('partial_rotary_factor', 1.0)}, the {family} family only has the types "
            f"default, {', '.join(_SCALINGS)} over whole heads; such a model cannot be imported"
        )
    scaling = _SCALINGS[kind]
    # Files of older versions, Qwen2.5's with YaRN among them, say `type`, which is kept beside
    # `rope_type`.
    own = set(scaling.model_fields) - {"type"}
    given = {name: rope[name] for name in own if rope.get(name) is not None}
    if kind == "yarn" and "attention_factor" not in given and rope.get("mscale_all_dim"):
        given |= _attention_factor(rope)
    if kind == "yarn" and rope.get("truncate", True) is None:
        given["truncate"] = False  # as transformers reads it
    try:
        return scaling(type=kind, **given)
    except ValidationError as error:
        first = error.errors()[0]
        value = given.get(str(first["loc"][0])) if first["loc"] else given
        raise ValueError(
            f"config.json: rope_parameters with rope_type={kind!r}: "
            f"{'.'.join(map(str, first['loc']))}={value!r}: {first['msg']}; correct it there"
        ) from None


def _attention_factor(rope: Mapping[str, Any]) -> dict[str, float]:
    """YaRN's factor in DeepSeek's spelling, `mscale` and `mscale_all_dim` (both, or neither)."""
    if not rope.get("mscale"):
        return {}
    above, below = (
        0.1 * rope[n] * math.log(rope["factor"]) + 1 for n in ("mscale", "mscale_all_dim")
    )
    return {"attention_factor": above / below}


def check_sizes(ours: DecoderConfig, theirs: DecoderConfig, source: str) -> None:
    """Check that weights of `theirs` fit `ours`, which may have fewer layers.

    Raises:
        ValueError: they do not.
    """
    differing = [name for name in _SIZES if getattr(ours, name) != getattr(theirs, name)]
    if ours.num_layers > theirs.num_layers:
        differing.append("num_layers")
    for name in differing:
        raise ValueError(
            f"{source}: {name}={getattr(theirs, name)} there, but {getattr(ours, name)} is asked "
            "for, so that the weights do not fit; leave the setting as it is there, or begin from "
            "scratch"
        )
