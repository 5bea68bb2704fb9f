"""Small models of the family, and texts for them."""

from __future__ import annotations

from typing import Any

import torch

from models.dart.config import DARTConfig
from models.dart.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.equivalence import build
from tests.models.families import CASES

BASE = CASES["dart"].config
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "shared trunk, twice": {"trunk": "shared", "recursions": 2, "num_layers": 2},
    "gaussian": {"diffusion_type": "gaussian"},
    "cosine, low rank": {"diffusion_schedule": "cosine", "exchange_rank": 3},
    "quadratic, no drafts": {"diffusion_schedule": "quadratic", "p_plan": 0.0},
    "blocks of 1": {"block_size": 1},
    "one block": {"block_size": 64},
    "all context, tied": {"p_uncond": 0.0, "tie_embeddings": True},
    "causal loss alone": {"ar_weight": 1.0},
}


def config_of(**changes: Any) -> DARTConfig:
    """BASE with other settings, checked."""
    return DARTConfig(**{**BASE.model_dump(), **changes})


def model_of(config: DARTConfig, *, noise: float = 0.2, **options: Any) -> SequentialModel:
    """A model in fp64, away from where gates and gains start."""
    specs = FAMILY.layer_specs(config, **options)
    return build(specs, ParallelContext.single(), seed=5, noise=noise).double()


def text_of(length: int, batch: int = 1, *, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length]."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, BASE.vocab_size, (batch, length), generator=generator)
