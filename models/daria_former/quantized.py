"""The linear layers of a model in int8, for inference on a CPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from models.daria_former.adapters import LoRALinear
from models.daria_former.single import DariaFormerModel


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
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if any(layer.weight.dtype != torch.float32 for _, layer in layers):
        raise ValueError("int8 quantisation starts from fp32 weights; call model.float() first")
    if torch.backends.quantized.engine == "none":
        raise ValueError("this torch has no int8 kernels for this CPU; use bf16 instead")
    quantized = copy.deepcopy(model).eval()
    for name, layer in layers:
        owner, _, own = name.rpartition(".")
        setattr(quantized.get_submodule(owner), own, _Int8Linear(layer))
    return quantized


class _Int8Linear(nn.Module):
    """Stands in for a layer of parallel.layers in one process."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.ctx: Any = layer.ctx
        # A plain nn.Linear of the same weights: the class that torch's table of replacements knows.
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        with warnings.catch_warnings():
            # Torch says that all this moves to a package of its own, torchao.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            self.product = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(plain), {nn.Linear}, dtype=torch.qint8
            )

    def local(self, x: Tensor, *, per_token: bool = True) -> Tensor:
        product: Tensor = self.product(x)
        return product

    forward = local
