"""The configuration under the contract test, what can be switched in it, and models of it."""

from __future__ import annotations

from typing import Any

import torch

from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.equivalence import build
from tests.models.families import CASES

BASE = CASES["daria_former"].config
SUBSETS: dict[str, dict[str, Any]] = {
    "all text paths": {},
    "local only": {"paths": ("local",)},
    "long only, no sinks": {"paths": ("long",), "num_global_tokens": 0},
    "local and memory": {"paths": ("local", "memory")},
    "no persistent slots": {"persistent_memory_slots": 0},
    "persona and long": {"paths": ("long", "persona")},
    "one emotion site": {"esv_sites": 1},
    "gru": {"esv_mode": "gru"},
    "layer norm, gelu": {"norm_type": "layer", "ffn_activation": "gelu"},
    "relu, untied": {"ffn_activation": "relu", "weight_tying": False},
    "sigmoid gates": {"gate_type": "sigmoid"},
    "no qk norm, full rhythm": {"qk_norm": False, "rhythm_rank": 0},
    "stretched positions": {"rope_scaling_factor": 4.0},
}
MODALITIES = {
    "image_enabled": True, "image_size": 8, "image_patch_size": 4,
    "audio_enabled": True, "audio_n_mels": 4, "audio_max_len": 9, "audio_conv_channels": 6,
}  # fmt: skip


def config_of(**changes: Any) -> DariaFormerConfig:
    """BASE with other settings."""
    return DariaFormerConfig.from_dict(BASE.to_dict() | changes)


def model_of(config: DariaFormerConfig, **options: Any) -> SequentialModel:
    """A model in fp64, away from where gates and gains start, in evaluation."""
    specs = FAMILY.layer_specs(config, **options)
    return build(specs, ParallelContext.single(), seed=5, noise=0.2).eval().double()


def tokens_of(length: int, batch: int = 1) -> torch.Tensor:
    """int64 [batch, length] that depend on the length alone."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, BASE.vocab_size, (batch, length), generator=generator)
