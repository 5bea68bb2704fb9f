"""The smallest configuration of a run that is valid, as a YAML file would hold it."""

from __future__ import annotations

import copy
from typing import Any

_VALUES: dict[str, Any] = {
    "run_dir": "runs/test",
    "model": {
        "family": "llama",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 256,
    },
    "data": {"train": "data/train", "validation": "data/validation", "sequence_length": 128},
    "training": {"max_steps": 10, "batch_size": 2, "lr": 1e-3, "precision": "fp32"},
}


def run_values(**changes: Any) -> dict[str, Any]:
    """A copy with `section__key=value` set; a double underscore stands for the dot."""
    values = copy.deepcopy(_VALUES)
    for key, value in changes.items():
        *parents, name = key.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return values
