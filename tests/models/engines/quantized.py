"""int8 weights by torch, torchao and quanto, against the same weights as plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models.engines.exports import GREEDY, TOKENS, Engine, assert_near, logits_of


def _linear(model: Any) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def _check(model: Any, engine: Engine, plain: Callable[[Any], torch.Tensor]) -> None:
    other = engine.load()
    layers = _linear(other)
    assert layers
    changed = 0
    for name in layers:
        weight = plain(model.get_submodule(name))
        changed += not torch.equal(weight, other.get_submodule(name).weight)
        other.get_submodule(name).weight.copy_(weight)
    assert changed == len(layers), f"{len(layers) - changed} of {len(layers)} not quantized"
    assert_near(logits_of(model), logits_of(other), 1e-3)
    assert model.generate(TOKENS, **GREEDY).shape == (2, 32)


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
    _check(model, engine, lambda layer: layer.weight().dequantize())
