"""Tensors of a decoder under GGUF's names, in the order of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import StoredModel, check_shape, parameter_table
from models.common.config import DecoderConfig
from models.gguf.architecture import Architecture
from models.hf.export_weights import first_dtype, open_weights
from parallel.checkpoint.weights_reader import ShardedWeightsReader

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FACTORS_NAME = "rope_freqs.weight"
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Entry(NamedTuple):
    """A tensor of the file: its name, shape and dtype, and ours, None for rotary factors."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    ours: str | None


def gguf_name(theirs: str) -> str:
    """GGUF's name of a tensor, from that of transformers' Llama, Qwen2 or Qwen3."""
    path, _, kind = theirs.rpartition(".")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if found is None:
        return f"{_OUTSIDE[path]}.{kind}"
    return f"blk.{found[1]}.{_IN_LAYER[found[2]]}.{kind}"


def in_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys, or their biases, so that dimensions i and i + d/2 of every head
    become 2i and 2i + 1."""
    heads = tensor.view(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def entries(
    stored: StoredModel,
    names: Mapping[str, str],
    architecture: Architecture,
    dtype: torch.dtype | None,
) -> list[Entry]:
    """All tensors. Matrices are of `dtype`, None for that of the weights, and vectors fp32, as
    llama.cpp computes with them.

    Raises:
        ValueError: the weights are not those of the configuration.
    """
    with open_weights(stored) as reader:
        target = dtype or first_dtype(reader, stored)
    table = parameter_table(stored.family, stored.config)
    found = []
    for ours, theirs in names.items():
        shape = table[ours].shape
        kind = target if len(shape) > 1 else torch.float32
        found.append(Entry(gguf_name(theirs), shape, kind, ours))
    if architecture.factors is not None:
        shape = architecture.factors.shape
        found.append(Entry(FACTORS_NAME, shape, torch.float32, None))
    return found


def tensors(
    stored: StoredModel, found: list[Entry], architecture: Architecture, *, cast: bool
) -> Iterator[Tensor]:
    """The tensors of `entries`, one in memory at a time; `cast`: their dtype was asked for.

    Raises:
        ValueError: weights of several dtypes that are not to be cast, or too large for fp16.
    """
    with open_weights(stored) as reader:
        for entry in found:
            if entry.ours is None:
                assert architecture.factors is not None
                yield architecture.factors
                continue
            yield _load(reader, stored, entry, pairs=architecture.pairs, cast=cast)


def _load(
    reader: ShardedWeightsReader, stored: StoredModel, entry: Entry, *, pairs: bool, cast: bool
) -> Tensor:
    assert entry.ours is not None
    full = reader.full(entry.ours)
    check_shape(entry.ours, full.shape, entry.shape, source=stored.weights)
    if full.dtype != entry.dtype and not cast and full.dim() > 1:
        raise ValueError(
            f"{stored.weights}: {entry.ours} is {full.dtype}, others are {entry.dtype}; choose "
            "--dtype"
        )
    config: DecoderConfig = stored.config
    if pairs and (heads := _heads(entry.name, config)) is not None:
        full = in_pairs(full, heads)
    tensor = full.to(entry.dtype).contiguous()
    if entry.dtype == torch.float16 and not bool((tensor.isfinite() | ~full.isfinite()).all()):
        raise ValueError(
            f"{entry.ours} has an entry of {full.abs().max().item():.3g}, fp16 none above 65504; "
            "choose --dtype bf16 or f32"
        )
    return tensor


def _heads(name: str, config: DecoderConfig) -> int | None:
    """The heads that the rows of a tensor belong to, None if they are not rotated."""
    kind = name.split(".")[-2]
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(kind)
