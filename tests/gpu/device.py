"""The device under test, and what lets one model run on it and on the CPU.

MANYFORMER_TEST_DEVICE=cpu runs the same tests on the CPU where there is no CUDA device. That shows
that the tests are sound, not that CUDA is right.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from models.base import TokenInputs
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.precision import Precision
from tests.models.families import CASES, evaluated

DEVICE = torch.device(os.environ.get("MANYFORMER_TEST_DEVICE", "cuda"))
SEQ, BATCH, SEED = 32, 3, 7


def context(device: torch.device, precision: str = "fp32") -> ParallelContext:
    return ParallelContext.single(device=device, precision=Precision(precision))


def model_of(
    name: str, ctx: ParallelContext, *, segmented: bool = False, **changes: Any
) -> SequentialModel:
    """A family's tiny model; its weights depend on the seed alone, not on the device. `changes`: of
    its configuration."""
    family, config = CASES[name]
    specs = family.layer_specs(config.model_copy(update=changes), segmented=segmented)
    return SequentialModel(specs, ctx, seed=SEED).to(ctx.precision.dtype)


def causal_model_of(name: str, ctx: ParallelContext, *, segmented: bool = False) -> SequentialModel:
    """`model_of` in a mode in which it is causal: for most families that of training, too."""
    model = model_of(name, ctx, segmented=segmented)
    if CASES[name].family.causal_in_training:
        return model
    alone = evaluated(model_of(name, ctx), tokens_of(name, ctx.device)[0].tokens)
    model.load_state_dict(alone.state_dict())
    return model.eval()


def tokens_of(name: str, device: torch.device) -> tuple[TokenInputs, Tensor]:
    """The same tokens and labels [b, s] on any device."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, SEQ + 1)
    stream = torch.randint(CASES[name].config.vocab_size, shape, generator=generator).to(device)
    return TokenInputs(stream[:, :-1].contiguous()), stream[:, 1:].contiguous()
