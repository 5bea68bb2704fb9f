"""A Daria-Former with adapters, for their tests."""

from __future__ import annotations

import torch
from torch import nn

from models.daria_former.carry import DariaInputs
from models.daria_former.config import LORA_TARGETS, DariaFormerConfig
from models.daria_former.model import layer_specs
from models.daria_former.standalone.lora import LoRAManager
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.models.families import CASES

CONFIG = CASES["daria_former"].config
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


def plain_model(config: DariaFormerConfig = CONFIG, ctx: ParallelContext | None = None):
    ctx = ctx or ParallelContext.single()
    return SequentialModel(layer_specs(config), ctx, seed=1).eval().double()


def logits_of(model: nn.Module, **inputs) -> torch.Tensor:
    return model(DariaInputs(TOKENS, **inputs)).logits


def managed(model: nn.Module | None = None, **settings) -> tuple[nn.Module, LoRAManager]:
    """A model whose primary adapter, and `first` and `second`, have learned something."""
    model = model or plain_model()
    manager = LoRAManager(model, **{"rank": 4, "alpha": 2, "targets": LORA_TARGETS} | settings)
    manager.inject()
    manager.add_adapter("first", rank=2)
    manager.add_adapter("second", rank=3, alpha=1)
    let_learn(model)
    return model, manager


def let_learn(model: nn.Module, *, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=std, generator=generator)
