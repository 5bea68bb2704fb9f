"""Checkpoints of the previous version: config.yaml, model.safetensors, training_state.pt."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.daria_former.config import DariaFormerConfig
from models.standalone.checkpoint import TrainingState, check_num_ranks, rank
from models.standalone.settings_file import read_settings
from parallel.checkpoint.errors import RESTORE

_TIED = ("body.embedding.tokens.weight", "body.head.output.weight")


def is_torch_checkpoint(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() and (folder / "config.yaml").is_file()


def read_model(folder: Path) -> tuple[DariaFormerConfig, dict[str, Tensor]]:
    """The configuration and the state dict; a tied tensor, stored once, under both names.

    Raises:
        ValueError: a file is damaged.
    """
    config = read_settings(folder / "config.yaml", DariaFormerConfig)
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder}/model.safetensors is damaged: it cannot be read; {RESTORE}"
        ) from error
    if config.weight_tying:
        state |= {name: state[stored] for stored in _TIED if stored in state for name in _TIED}
    return config, state


def read_training_state(folder: Path) -> TrainingState:
    """The state of this process; nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: it is damaged, or another number of processes wrote it.
    """
    path = folder / "training_state.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        ranks = list(state["ranks"])
    except Exception as error:  # torch raises errors of many types for damaged files
        raise ValueError(f"{path} is damaged: it cannot be read; {RESTORE}") from error
    check_num_ranks(folder, len(ranks))
    return TrainingState(state, ranks[rank()])
