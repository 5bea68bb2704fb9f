"""Llama and Qwen2 models as transformers saves them, from which families begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}


def save_base_model(kind: str, directory: Path, *, num_layers: int) -> Path:
    """Save a random model of type `kind`; returns its directory."""
    torch.manual_seed(0)
    model_cls, config_cls = MODELS[kind]
    model_cls(config_cls(**SIZES, num_hidden_layers=num_layers)).save_pretrained(directory)
    return directory


def rewrite_tensors(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `change` to the tensors of a sharded model, and store them in one file."""
    tensors: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (model / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
