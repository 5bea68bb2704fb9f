"""Small models of both families whose thresholds have seen scores: tokens are left out."""

from __future__ import annotations

from typing import Any

import torch

from models.base import ModelFamily, TokenInputs
from parallel.carry import SequentialModel
from parallel.layer_state import layer_state_owners, persistent_buffers, update_layer_states
from tests.models import checkpoints


def settled(of: Any, family: ModelFamily, *, length: int = 64) -> SequentialModel:
    """In evaluation, after one step that moved the thresholds and nothing else."""
    whole = checkpoints.model(of, family).train()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, of.vocab_size, (4, length), generator=generator)
    with torch.no_grad():
        whole(TokenInputs(tokens))
    update_layer_states(layer_state_owners(whole), ctx=whole.ctx)
    thresholds = [tau for n, tau in persistent_buffers(whole).items() if n.endswith("tau")]
    assert len(thresholds) == of.num_routed
    assert all(bool(tau.isfinite().all()) for tau in thresholds)
    return whole.eval()
