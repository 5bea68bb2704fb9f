"""Both families in Hugging Face's form: their own code, Qwen2's names, and Qwen2 as a beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.base import BaseModelMapping
from models.checkpoint import parameter_table
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.hf.names import BASE_DEFAULTS, file_name, is_added, is_plain
from models.hf.custom_code import own_code
from models.hf.llama_names import check_sizes, decoder_contents, decoder_settings
from models.registry import get_family


def _from_base(config_class: type[MoDConfig | DTFConfig], family: str) -> BaseModelMapping:
    def from_config(contents: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
        return config_class(**{**decoder_settings(contents, family=family), **changes})

    def names(config: Any) -> dict[str, str]:
        found = {}
        for ours in parameter_table(get_family(family), config):
            theirs = file_name(ours)
            if is_plain(theirs):
                found[ours] = theirs
            elif not is_added(theirs):
                raise ValueError(
                    f"{theirs} is a tensor that Qwen2 does not have, where it has another; a model "
                    "with it begins from scratch and has no plain form"
                )
        return found

    return BaseModelMapping(
        model_types=("qwen2",),
        from_config=from_config,
        defaults=BASE_DEFAULTS,
        check_sizes=check_sizes,
        names=names,
        to_config=plain_config,
        check_same_function=check_unrouted,
    )


def plain_config(config: MoDConfig | DTFConfig) -> dict[str, Any]:
    """The contents of Qwen2's config.json for the model with every token computed in every layer.

    Raises:
        ValueError: with every token computed the model is still not Qwen2.
    """
    if config.is_routed and config.gate_fn != "st":
        raise ValueError(
            f"gate_fn={config.gate_fn} scales what routed layers add, which Qwen2 cannot; only a "
            "model with gate_fn=st or capacity_gamma=1 has a plain form"
        )
    if not config.qkv_bias:
        raise ValueError("qkv_bias=False: Qwen2 has biases, so this model has no plain form")
    return decoder_contents(config, model_type="qwen2", architecture="Qwen2ForCausalLM")


def check_unrouted(config: MoDConfig | DTFConfig) -> None:
    """Check that the model is the plain decoder of its shape.

    Raises:
        ValueError: it has routed layers or experts.
    """
    remedy = "export it with to-hf, which brings its code"
    if config.is_routed:
        raise ValueError(
            f"capacity_gamma={config.capacity_gamma}: only at 1 is model.family={config.family} "
            f"the plain decoder that other programs compute; {remedy}"
        )
    if config.num_experts is not None:
        raise ValueError(
            f"num_experts={config.num_experts}: a plain decoder has one feed-forward part in a "
            f"layer; {remedy}"
        )


MOD_HF = own_code(
    "mod",
    "models.dynamic.hf.config_mod",
    "MoDHFConfig",
    name=file_name,
    base=_from_base(MoDConfig, "mod"),
)
DTF_HF = own_code(
    "dtf",
    "models.dynamic.hf.config_dtf",
    "DTFHFConfig",
    name=file_name,
    base=_from_base(DTFConfig, "dtf"),
)
