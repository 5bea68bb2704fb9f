"""int8 weights by torch, torchao and quanto, against the same weights as plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models.engines.exports import GREEDY, TOKENS, Engine, assert_near, logits_of


@torch.no_grad()
def _check(
    model: Any,
    engine: Engine,
    plain: Callable[[Any], torch.Tensor],
    *,
    with_head: bool = False,
    within: float = 1e-3,
    inputs: Callable[..., Any] | None = None,
) -> None:
    """Equal to a model whose linear layers have the quantized weights as `plain` numbers, and
    whose inputs a hook `inputs` rounds."""
    other = engine.load()
    head = None if with_head else other.get_output_embeddings()
    layers = {
        name: module
        for name, module in other.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    assert layers
    changed = 0
    for name, layer in layers.items():
        weight = plain(model.get_submodule(name))
        changed += not torch.equal(weight, layer.weight)
        layer.weight = nn.Parameter(weight)
        if inputs is not None:
            layer.register_forward_pre_hook(inputs)
    assert changed == len(layers), f"{len(layers) - changed} of {len(layers)} not quantized"
    assert_near(logits_of(model), logits_of(other), within)
    assert model.generate(TOKENS, **GREEDY).shape == (2, 32)


def _rounded(layer: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Inputs in 7 bits with one scale, as torch's dynamically quantized layers have them."""
    (x,) = arguments
    scale, zero = torch._choose_qparams_per_tensor(x, True)
    return (torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 127),)


def torchao_int8(engine: Engine) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = engine.load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    _check(model, engine, lambda layer: layer.weight.dequantize())


def quanto_int8(engine: Engine) -> None:
    from transformers import QuantoConfig

    model = engine.load(quantization_config=QuantoConfig(weights="int8"))
    _check(model, engine, lambda layer: layer.weight.dequantize())


def dynamic_int8(engine: Engine) -> None:
    model = torch.ao.quantization.quantize_dynamic(engine.load(), {nn.Linear}, dtype=torch.qint8)
    _check(
        model,
        engine,
        lambda layer: layer.weight().dequantize(),
        with_head=True,
        within=0.05,  # values at the edge of a step fall on either side
        inputs=_rounded,
    )
