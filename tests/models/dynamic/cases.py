"""Tiny models of both families and what tests ask of them."""

from __future__ import annotations

from typing import Any

import torch

from models.base import ModelFamily, TokenInputs
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.model import DTF, MOD
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.layer_state import layer_state_owners, update_layer_states
from tests.equivalence import build

CTX = ParallelContext.single()
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 128,
    "init_std": 0.3,
    "router_init_std": 0.3,
}

# Every option at least once, against the oracle.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mod": ("mod", {}),
    "mod raw": ("mod", {"gate_fn": "raw", "router_input": "raw", "capacity_gamma": 0.25}),
    "mod st": ("mod", {"gate_fn": "st", "mod_every": 1, "mod_offset": 0, "force_first": True}),
    "mod predictor": ("mod", {"causal_router": "predictor", "predictor_hidden": 8}),
    "mod aux": ("mod", {"causal_router": "aux", "mod_every": 3, "mod_offset": 2}),
    "mod random": ("mod", {"router_score": "random"}),
    "dtf": ("dtf", {}),
    "dtf odd": ("dtf", {"num_layers": 5, "capacity_gamma": 0.25, "gate_fn": "st"}),
    "dtf raw numbers": ("dtf", {"surprise_norm": "none", "prior_loss": "mse"}),
    "dtf kl": ("dtf", {"surprise": "kl", "prior_type": "swiglu", "force_first": False}),
    "dtf open": ("dtf", {"router_detach": False, "prior_detach_input": False}),
    "dtf fixed": ("dtf", {"learn_o_ce": False, "learn_m_cu": False, "ma_skip_first": False}),
    "dtf ce": ("dtf", {"router_score": "ce"}),
    "dtf cu": ("dtf", {"router_score": "cu", "ma_window": 5}),
    "dtf dst": ("dtf", {"router_score": "dst"}),
    "dtf dch": ("dtf", {"router_score": "dch"}),
    "dtf linear": ("dtf", {"router_score": "linear", "causal_router": "aux"}),
    "dtf random": ("dtf", {"router_score": "random", "causal_router": "predictor"}),
}


def config_of(family: str, **changes: Any) -> MoDConfig | DTFConfig:
    return (MoDConfig if family == "mod" else DTFConfig)(**(SIZES | changes))


def family_of(config: MoDConfig | DTFConfig) -> ModelFamily:
    return MOD if isinstance(config, MoDConfig) else DTF


def model_of(config: MoDConfig | DTFConfig, *, segmented: bool = False) -> SequentialModel:
    """In fp64 and in training mode, with everything away from where it starts."""
    specs = family_of(config).layer_specs(config, segmented=segmented)
    return build(specs, CTX, seed=11, noise=0.2).double()


@torch.no_grad()
def evaluated(config: MoDConfig | DTFConfig, tokens: torch.Tensor) -> SequentialModel:
    """In evaluation mode, with the thresholds of these tokens."""
    model = model_of(config)
    model(TokenInputs(tokens))
    update_layer_states(layer_state_owners(model), ctx=CTX)
    return model.eval()


def tokens_of(length: int, *, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """int64 [batch, length]. No token occurs twice in a row where there are enough of them: equal
    tokens have equal scores in a router of the first layer, and the last bit would choose."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = SIZES["vocab_size"]
    if length > vocab_size:
        return torch.randint(0, vocab_size, (batch, length), generator=generator)
    rows = [torch.randperm(vocab_size, generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows)
