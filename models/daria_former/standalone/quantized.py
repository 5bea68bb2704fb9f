"""The linear layers of a model in int8, for inference on a CPU."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from models.daria_former.adapters import LoRALinear
from models.daria_former.standalone.model import DariaFormerModel

_HEAD = "head.output"


def quantize_int8(model: DariaFormerModel) -> DariaFormerModel:
    """A copy whose linear layers keep their weights in int8, a scale for each tensor.

    Torch's dynamic quantisation: activations are quantised as they come and products are int8.
    Embedding, head, norms and everything of the emotion state stay as they are. CPU only, and for
    inference only.

    Raises:
        ValueError: adapters that are not merged, weights that are not fp32, or no int8 kernels.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("a model with adapters cannot be quantised; merge and strip them first")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers = {name: m for name, m in layers.items() if not name.endswith(_HEAD)}
    if any(layer.weight.dtype != torch.float32 for layer in layers.values()):
        raise ValueError("int8 quantisation starts from fp32 weights; call model.float() first")
    if torch.backends.quantized.engine == "none":
        raise ValueError("this torch has no int8 kernels for this CPU; use bf16 instead")
    with warnings.catch_warnings():
        # Torch says that all this moves to a package of its own, torchao.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        quantized: DariaFormerModel = torch.ao.quantization.quantize_dynamic(
            model, set(layers), dtype=torch.qint8
        )
    return quantized.eval()
