"""The families under the contract test, each with a tiny configuration that shows all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from models.base import ModelFamily, TokenInputs
from models.daria_former.config import LORA_TARGETS
from models.registry import get_config_class, get_family
from parallel.carry import SequentialModel
from parallel.layer_state import layer_state_owners, update_layer_states
from tests.models import awkward
from tests.models.mixture.config import MixtureConfig
from tests.models.mixture.model import FAMILY as MIXTURE


class Case(NamedTuple):
    family: ModelFamily
    config: Any


def case(family: str, **settings: Any) -> Case:
    """A registered family with these settings."""
    return Case(get_family(family), get_config_class(family)(**settings))


# Vocabularies that a tensor size of 2 does not divide, so that padding is always exercised.
_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 256,
    "init_std": 0.3,  # large, so that every path matters
}

# Every boundary (window, stride, segment, capacity) falls inside the 32 tokens of a test.
_DARIA_FORMER = {
    "vocab_size": 61,
    "hidden_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_dim": 64,
    "max_seq_len": 256,
    "sliding_window_size": 6,
    "num_global_tokens": 3,
    "segment_len": 4,
    "working_stride": 2,
    "episodic_stride": 4,
    "working_memory_slots": 5,
    "episodic_memory_slots": 3,
    "persistent_memory_slots": 4,
    "persona_memory_slots": 5,
    "memory_top_k": 3,
    "persona_dim": 8,
    "emotion_dim": 8,
    "esv_sites": 2,
    "rhythm_rank": 8,
    "initializer_range": 0.1,
    "dropout": 0.1,
}

# Every boundary (patch, window, chunk) falls inside the 8 patches of a test. Two thinking steps:
# the second is always taken, so that generation costs what the formula says.
_AGIFORMER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "byte_dim": 16,
    "window_size": 3,
    "memory_chunk_size": 3,
    "plasticity": 0.9,
    "thinking_steps": 2,
    "head_hidden": 24,
    "dropout": 0.1,
    "init_std": 0.3,
}

_DYNAMIC = _LLAMA | {"capacity_gamma": 0.5, "router_init_std": 0.3}

# Blocks end inside the 32 tokens of a test and beyond them; rows have every kind of block.
_DART = _LLAMA | {
    "intermediate_size": 32,
    "block_size": 5,
    "diffusion_steps": 8,
    "diffusion_schedule": "linear",
    "p_uncond": 0.1,
}

# Layers with memory read one, two and three others, so that stages are also cut inside of windows.
_AMRPA = _LLAMA | {
    "num_layers": 5,
    "target_layers": [1, 2, 4],
    "memory_noise": 0.1,
    "alpha_mlp_hidden": 12,
    "dropout": 0.1,
}

# Of contexts of 8 tokens, so that the 32 of a test are far beyond the original ones.
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
_LLAMA3 = {
    "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip

CASES = {
    "agiformer": case("agiformer", **_AGIFORMER),
    "agiformer_variant": case(
        "agiformer",
        **_AGIFORMER | {"num_heads": 2, "memory_chunk_size": 64},
        fusion="triple",
        decay_floor=0.9,
        halting="soft",
        patch_size=2,
        patch_kernel=5,
    ),
    "amrpa": case("amrpa", **_AMRPA),
    "amrpa_variant": case(
        "amrpa",
        **_AMRPA | {"target_layers": "all", "memory_noise": 0.0, "dropout": 0.0},
        history_kind="context",
        history_scope="targets",
        detach_history=False,
        adaptive_window=False,
        max_window_size=2,
        gate_activation="tanh",
        alpha_mlp_layers=3,
        tie_embeddings=True,
        qkv_bias=True,
        head_dim=12,
        rope_scaling=_YARN | {"attention_factor": 1.3, "truncate": False},
    ),
    "daria_former": case("daria_former", **_DARIA_FORMER),
    "daria_former_variant": case(
        "daria_former",
        **_DARIA_FORMER
        | {
            "paths": ("local", "memory"),
            "esv_mode": "gru",
            "norm_type": "layer",
            "ffn_activation": "gelu",
            "gate_type": "sigmoid",
            "weight_tying": False,
            "persistent_memory_slots": 0,
            "qk_norm": False,
            "rhythm_rank": 0,
        },
    ),
    "daria_former_lora": case(
        "daria_former",
        **_DARIA_FORMER,
        lora_rank=3,
        lora_alpha=2.0,
        lora_dropout=0.2,
        lora_targets=LORA_TARGETS,
    ),
    "llama": case("llama", **_LLAMA),
    "llama_qwen2_shape": case(
        "llama", **_LLAMA, qkv_bias=True, tie_embeddings=True, rope_theta=1e6
    ),
    "llama_qwen3_shape": case(
        "llama",
        **_LLAMA,
        qk_norm=True,
        head_dim=12,
        sliding_window=5,
        layer_types=["sliding_attention", *["full_attention"] * (_LLAMA["num_layers"] - 1)],
        rope_scaling=_YARN,
    ),
    "llama_olmo2_shape": case("llama", **_LLAMA, qk_norm="all_heads", norm_after=True, head_dim=12),
    "llama_gemma_shape": case(
        "llama",
        **_LLAMA,
        activation="gelu_tanh",
        zero_centered_gamma=True,
        scale_embeddings=True,
        tie_embeddings=True,
    ),
    "mod": case("mod", **_DYNAMIC),
    "mod_variant": case(
        "mod",
        **_DYNAMIC | {"capacity_gamma": 0.25},
        gate_fn="raw",
        router_input="raw",
        capacity_multiple=3,
        mod_offset=0,
        force_first=True,
        tie_embeddings=True,
        qkv_bias=False,
        head_dim=12,
        rope_scaling=_YARN,
    ),
    "mod_experts": case(
        "mod", **_DYNAMIC | {"intermediate_size": 32}, num_experts=4, experts_per_token=2
    ),
    "dart": case("dart", **_DART),
    "dart_variant": case(
        "dart",
        **_DART | {"num_layers": 3, "block_size": 4, "p_uncond": 0.0},
        trunk="shared",
        diffusion_type="gaussian",
        recursions=2,
        exchange_rank=3,
        tie_embeddings=True,
        qkv_bias=True,
        head_dim=12,
        rope_scaling=_LLAMA3,
    ),
    "dtf": case("dtf", **_DYNAMIC),
    "dtf_variant": case(
        "dtf",
        **_DYNAMIC | {"num_layers": 5, "capacity_gamma": 0.25},
        gate_fn="st",
        surprise="kl",
        surprise_norm="none",
        prior_type="swiglu",
        router_detach=False,
        prior_detach_input=False,
        ma_skip_first=False,
        force_first=False,
        tie_embeddings=True,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "awkward": Case(awkward.FAMILY, awkward.AwkwardConfig(num_layers=4)),
    "mixture": Case(MIXTURE, MixtureConfig()),
}


# FLOPs per token of training that decoding with a cache leaves out: it makes the logits of one of
# two streams.
NOT_DECODED = {
    name: 2 * CASES[name].config.vocab_size * CASES[name].config.hidden_size
    for name in ("dart", "dart_variant")
}


@torch.no_grad()
def evaluated(model: SequentialModel, tokens: torch.Tensor) -> SequentialModel:
    """The model as it is evaluated after one step on these tokens, from which layers have taken
    what they learn beside their parameters."""
    model(TokenInputs(tokens))
    update_layer_states(layer_state_owners(model), ctx=model.ctx)
    return model.eval()
