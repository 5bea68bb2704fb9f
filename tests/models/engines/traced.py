"""torch.jit.trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.engines.exports import TOKENS, Engine, assert_near


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def jit_traced(engine: Engine) -> None:
    model = Logits(engine.load())
    traced = torch.jit.trace(model, (TOKENS,), check_trace=False)
    other = TOKENS.flip(0)
    assert_near(traced(other), model(other))
