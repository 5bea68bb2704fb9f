"""Locations of attention in the transformers models that AMRPA reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.amrpa.injection.attention import IMPLEMENTATION


@dataclass(frozen=True)
class Stack:
    """A stack of layers of a model.

    `name`: as in the prefix of `target_layers`. `layers`: path of the list of layers in the base
    model. `attention`: path of the self-attention in a layer. `num_heads`, `head_dim`: settings of
    the model's configuration; a missing head_dim is hidden_size / num_heads. `cross_attention`:
    path of the cross-attention in a layer, which has as many heads; None where there is none.
    """

    name: str
    layers: str
    attention: str
    num_heads: str = "num_attention_heads"
    head_dim: str = "head_dim"
    cross_attention: str | None = None


@dataclass(frozen=True)
class Architecture:
    """The stacks of a model, and settings under which its attention takes another way, refused.

    Rotary embeddings, if any, rotate dimensions i and i + r/2 by `position_embeddings`, an argument
    of the attention, (cos, sin) of r dimensions each, and leave those behind r alone.
    """

    stacks: tuple[Stack, ...]
    refused: tuple[str, ...] = ()


def _encoder(layers: str, attention: str) -> Architecture:
    return Architecture((Stack("encoder", layers, attention),))


def _decoder(layers: str, attention: str, *refused: str) -> Architecture:
    return Architecture((Stack("decoder", layers, attention),), refused)


_BERT = _encoder("encoder.layer", "attention.self")
_LLAMA = _decoder("layers", "self_attn")
_BART = Architecture(
    (
        Stack("encoder", "encoder.layers", "self_attn", num_heads="encoder_attention_heads"),
        Stack(
            "decoder",
            "decoder.layers",
            "self_attn",
            num_heads="decoder_attention_heads",
            cross_attention="encoder_attn",
        ),
    )
)
_T5 = Architecture(
    (
        Stack("encoder", "encoder.block", "layer.0.SelfAttention", head_dim="d_kv"),
        Stack(
            "decoder",
            "decoder.block",
            "layer.0.SelfAttention",
            head_dim="d_kv",
            cross_attention="layer.1.EncDecAttention",
        ),
    )
)

# By `model_type`.
ARCHITECTURES: Mapping[str, Architecture] = {
    "albert": _encoder("encoder.albert_layer_groups", "attention"),
    "bart": _BART,
    "bert": _BERT,
    "distilbert": _encoder("transformer.layer", "attention"),
    "electra": _BERT,
    "gemma3_text": _LLAMA,
    "gpt2": _decoder("h", "attn", "reorder_and_upcast_attn"),
    "gpt_neox": _decoder("layers", "attention"),
    "llama": _LLAMA,
    "marian": _BART,
    "mbart": _BART,
    "mistral": _LLAMA,
    "modernbert": _encoder("layers", "attn"),
    "olmo2": _LLAMA,
    "opt": _decoder("decoder.layers", "self_attn"),
    "pegasus": _BART,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "t5": _T5,
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model's configuration.

    Raises:
        ValueError: its attention cannot be routed.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(
            f"model_type={config.model_type!r} is none whose attention AMRPA reaches: "
            f"{', '.join(ARCHITECTURES)}; choose one of them or pass adapter=Architecture(...)"
        )
    return architecture


def check_routable(config: Any, architecture: Architecture) -> None:
    """Check that the attention of a model goes through transformers' attention interface.

    Raises:
        ValueError: it does not.
    """
    for setting in architecture.refused:
        if getattr(config, setting, False):
            raise ValueError(
                f"{setting}={getattr(config, setting)} computes attention where AMRPA cannot reach "
                f"it; load the model with {setting}=False"
            )
    implementation = config._attn_implementation
    # Injected models share their configuration with models that are made from it, which run sdpa.
    if implementation not in ("sdpa", IMPLEMENTATION):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot be routed through AMRPA; load the "
            "model with attn_implementation='sdpa'"
        )


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, None where there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def attentions(config: Any, layers: nn.Module, stack: Stack) -> list[nn.Module]:
    """The self-attention of every layer in order of depth.

    A model that shares layers (ALBERT) names one attention several times.

    Raises:
        ValueError: a layer has no module there.
    """
    if config.model_type != "albert":
        found = [find(layer, stack.attention) for layer in layers.children()]
        modules = [module for module in found if module is not None]
        if len(modules) != len(found):
            raise ValueError(
                f"attention={stack.attention!r} of the adapter is no module of every layer; give "
                "its path in a layer"
            )
        return modules
    depth, groups = config.num_hidden_layers, config.num_hidden_groups
    chosen = [int(i / (depth / groups)) for i in range(depth)]
    inner = [list(group.albert_layers) for group in layers.children()]  # type: ignore[arg-type]
    return [layer.get_submodule(stack.attention) for i in chosen for layer in inner[i]]
