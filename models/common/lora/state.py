"""State dicts of models with adapters: merging, stored settings; name suggestions for errors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from models.common.lora.layers import PRIMARY

# The child of a model that carries the settings of its LoRAManager, and its key in a state dict.
SETTINGS = "lora_settings"
SETTINGS_KEY = f"{SETTINGS}._extra_state"


@torch.no_grad()
def merged_state_dict(state: Mapping[str, Any], *, alpha: float | None = None) -> dict[str, Tensor]:
    """The state dict of the plain model: `W + sum_n w_n (alpha_n / r_n) B_n A_n`, no adapters.

    Merges the active adapters of a model with a LoRAManager or, given `alpha` (its `lora_alpha`),
    the primary adapter of a model that was built with `lora_rank`. The result fits the
    configuration with `lora_rank=0` and `lora_dropout=0.0`. `state` is not changed.

    Raises:
        ValueError: the weight of an active adapter is computed, or an alpha is unknown.
    """
    settings: dict[str, Any] = {"alpha": alpha, "adapters": {}}
    if SETTINGS_KEY in state:
        settings = read_settings(state[SETTINGS_KEY])
    if settings["alpha"] is None:
        raise ValueError(
            "alpha=None for a model without a LoRAManager; give the lora_alpha of its configuration"
        )
    alphas, weights = {PRIMARY: settings["alpha"]}, {PRIMARY: 1.0}
    for name, adapter in settings["adapters"].items():
        alphas[name], weights[name] = adapter["alpha"], adapter["weight"]
        if isinstance(adapter["weight"], str):
            raise ValueError(
                f"adapter {name!r} has weight={adapter['weight']!r}, computed in every call, and "
                "only a number can be merged; save the model with it deactivated, or activated with"
                " a number"
            )
    merged = {k: v for k, v in state.items() if ".lora." not in k and k != SETTINGS_KEY}
    for key, A in state.items():
        found = re.fullmatch(r"(.+)\.lora\.(\w+)\.A", key)
        if not found or f"{found[1]}.weight" not in merged:
            continue
        target, name = f"{found[1]}.weight", found[2]
        if name not in weights:
            raise ValueError(f"{key}: the alpha of {name!r} is unknown; save it with its manager")
        if weights[name] is not None:
            wide = torch.promote_types(A.dtype, torch.float32)
            scale = weights[name] * alphas[name] / len(A)
            product = state[f"{found[1]}.lora.{name}.B"].to(wide) @ A.to(wide)
            merged[target] = merged[target].to(wide) + scale * product
    return {key: value.to(state[key].dtype) for key, value in merged.items()}


def written_settings(settings: Mapping[str, Any]) -> Tensor:
    """JSON as bytes, since files of tensors hold nothing else: uint8 [n]."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def read_settings(written: Tensor) -> dict[str, Any]:
    """The inverse of `written_settings`."""
    return json.loads(bytes(written.to(torch.uint8).tolist()))


def nearest(name: str, known: Collection[str]) -> str:
    """The remedy of an error message: the known names nearest to `name`, or all of them."""
    close = difflib.get_close_matches(name, known, n=3) or list(known)
    return f"choose one of {', '.join(close)}" if close else "this model has none, leave it out"
