"""Int8 quantization of linear layers, for inference on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TypeVar

import torch
from torch import nn

from models.common.lora.layers import LoRALinear

Model = TypeVar("Model", bound=nn.Module)


def quantize_int8(model: Model, *, keep: Collection[str] = ("head.output",)) -> Model:
    """Copy a model with its linear layers quantized to int8, with one scale per tensor.

    Torch's dynamic quantization: activations are quantized on the fly, and products are int8.
    Layers whose names end with one of `keep`, and everything other than linear layers, are
    unchanged. For inference on a CPU only.

    Raises:
        ValueError: unmerged adapters, weights that are not fp32, or a torch without int8 kernels.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("a model with adapters cannot be quantized; merge and strip them first")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(tuple(keep))
    }
    if any(layer.weight.dtype != torch.float32 for layer in layers.values()):
        raise ValueError("int8 quantization starts from fp32 weights; call model.float() first")
    if torch.backends.quantized.engine == "none":
        raise ValueError("this torch has no int8 kernels for this CPU; use bf16 instead")
    with warnings.catch_warnings():
        # torch 2.13 announces that quantization moves to a package of its own, torchao.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        quantized: Model = torch.ao.quantization.quantize_dynamic(
            model, set(layers), dtype=torch.qint8
        )
    return quantized.eval()
