"""Small models of the family, and texts for them."""

from __future__ import annotations

from typing import Any

import torch

from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.equivalence import build
from tests.models.families import CASES

BASE = CASES["agiformer"].config
# Patches that halt after one, two and more steps.
THINKING = {"thinking_steps": 5, "act_epsilon": 0.1}


def config_of(**changes: Any) -> AgiformerConfig:
    """BASE with other settings, checked."""
    return AgiformerConfig(**{**BASE.model_dump(), **changes})


def model_of(config: AgiformerConfig, **options: Any) -> SequentialModel:
    """A model in fp64, away from where gates and gains start, in evaluation."""
    specs = FAMILY.layer_specs(config, **options)
    return build(specs, ParallelContext.single(), seed=5, noise=0.2).eval().double()


def text_of(length: int, batch: int = 1) -> torch.Tensor:
    """int64 [batch, length] that depend on the length alone."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, BASE.vocab_size, (batch, length), generator=generator)
