"""The llama family in Hugging Face's names: transformers' Llama and Qwen2, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.base import HFMapping
from models.common.config import RopeScaling
from models.llama.config import LlamaConfig

_EMBEDDING = ("embedding.tokens.weight", "model.embed_tokens.weight")
_HEAD = ("head.output.weight", "lm_head.weight")
_FINAL_NORM = ("head.norm.weight", "model.norm.weight")
_BLOCK = {
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
_BLOCK_BIAS = {
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.bias": "self_attn.v_proj.bias",
}
# ours -> theirs, for settings that mean the same
_SETTINGS = {
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
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# theirs -> the only value that the family can represent
_REQUIRED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


def parameter_names(config: LlamaConfig) -> dict[str, str]:
    """Our parameter name -> theirs, in the order of the layers; a tied head has none of its own."""
    block = _BLOCK | (_BLOCK_BIAS if config.qkv_bias else {})
    names = dict([_EMBEDDING])
    for i in range(config.num_layers):
        names |= {
            f"block_{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in block.items()
        }
    return names | dict([_FINAL_NORM] if config.tie_embeddings else [_FINAL_NORM, _HEAD])


def tied_names(config: LlamaConfig) -> dict[str, str]:
    """Their second name of a tied tensor -> the first."""
    return {_HEAD[1]: _EMBEDDING[1]} if config.tie_embeddings else {}


def to_hf_config(config: LlamaConfig) -> dict[str, Any]:
    """The contents of config.json: Qwen2 with `qkv_bias`, Llama without.

    Raises:
        ValueError: transformers has no model of this shape.
    """
    if not config.qkv_bias and config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} is not a multiple of num_heads={config.num_heads}, "
            "which transformers' LlamaConfig demands; such a model cannot be exported"
        )
    kind = ("qwen2", "Qwen2ForCausalLM") if config.qkv_bias else ("llama", "LlamaForCausalLM")
    contents: dict[str, Any] = {"model_type": kind[0], "architectures": [kind[1]]}
    contents |= {theirs: getattr(config, ours) for ours, theirs in _SETTINGS.items()}
    contents |= {"head_dim": config.head_size, "hidden_act": "silu", "attention_dropout": 0.0}
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {"rope_type": scaling.type} | {name: getattr(scaling, name) for name in _SCALING}
    # transformers 5 reads rope_parameters; what reads the older format would use its default theta.
    return contents | {
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
    }


def from_hf_config(contents: Mapping[str, Any]) -> LlamaConfig:
    """Our configuration from the contents of a config.json of transformers' Llama or Qwen2.

    Raises:
        ValueError: a setting that the family does not have.
    """
    from transformers import AutoConfig

    settings = {k: v for k, v in contents.items() if k != "model_type"}
    theirs = AutoConfig.for_model(contents["model_type"], **settings)
    for name, required in _REQUIRED.items():
        if getattr(theirs, name, required) != required:
            raise ValueError(
                f"config.json: {name}={getattr(theirs, name)!r}, the llama family only has "
                f"{required!r}; such a model cannot be imported"
            )
    values = {ours: getattr(theirs, name) for ours, name in _SETTINGS.items()}
    head_dim = getattr(theirs, "head_dim", None)
    if head_dim is not None and head_dim * theirs.num_attention_heads != theirs.hidden_size:
        values["head_dim"] = head_dim
    rope = theirs.rope_parameters
    return LlamaConfig(
        **values,
        qkv_bias=contents["model_type"] == "qwen2",
        rope_theta=rope["rope_theta"],
        rope_scaling=_scaling(rope),
    )


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: rope_parameters={dict(rope)!r}, the llama family only has the types "
            "default and llama3 over whole heads; such a model cannot be imported"
        )
    if kind == "default":
        return None
    return RopeScaling(type="llama3", **{name: rope[name] for name in _SCALING})


HF = HFMapping(
    model_types=("llama", "qwen2"),
    to_config=to_hf_config,
    from_config=from_hf_config,
    names=parameter_names,
    tied=tied_names,
    derived=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
