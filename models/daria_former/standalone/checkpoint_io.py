"""Loading of any checkpoint of a Daria-Former as a DariaFormerModel: of a run, a Trainer, or the
previous version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import StoredModel, load_model, open_checkpoint, parameter_table
from models.common.lora.state import SETTINGS_KEY, merged_state_dict
from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY
from models.daria_former.standalone.logits_processor import ReactionVariabilitySystem
from models.daria_former.standalone.lora import LoRAManager
from models.daria_former.standalone.model import DariaFormerModel
from models.daria_former.standalone.torch_checkpoint import is_torch_checkpoint, read_model
from models.standalone.checkpoint import (
    has_training_state,
    load_into,
    load_model_state,
    write_model,
)
from parallel.checkpoint.manifest import UNKNOWN_TEXT, TextRecord
from parallel.checkpoint.weights import Weight


def is_run(path: Path) -> bool:
    """Whether a directory is a run or one of its checkpoints, and not a Trainer's."""
    return not (is_torch_checkpoint(path) or has_training_state(path))


class Loaded(NamedTuple):
    """A model in evaluation mode, the tokenizer of its data, and its encoding rules."""

    model: DariaFormerModel
    tokenizer: str | None
    text: TextRecord


def load_checkpoint(path: Path, *, device: str) -> Loaded:
    """Load the model of a checkpoint, with its adapters.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or of another family.
    """
    if is_torch_checkpoint(path):
        config, state = read_model(path)
        return Loaded(_filled(config, state, device=device, source=path), None, UNKNOWN_TEXT)
    stored = open_checkpoint(path)
    if stored.family.name != FAMILY.name:
        raise ValueError(f"{path} is a checkpoint of {stored.family.name}, not of {FAMILY.name}")
    if not is_run(path):
        state = load_model_state(path, stored)
        model = _filled(stored.config, state, device=device, source=path)
    else:
        model = DariaFormerModel(stored.config, device="meta")
        model.body = load_model(stored, device=device)
        model.variability = ReactionVariabilitySystem(stored.config).to(device)
    return Loaded(model.eval(), stored.tokenizer, stored.text)


def _filled(
    config: DariaFormerConfig, state: Mapping[str, Tensor], *, device: str, source: Path
) -> DariaFormerModel:
    """Load the state of a Trainer's model, which may have had a LoRAManager, into a model."""
    model = DariaFormerModel(config, device=device)
    if SETTINGS_KEY in state:
        build = LoRAManager.from_state_dict
        load_into(model, state, source=source, load=lambda state: build(model, state))
    else:
        load_into(model, state, source=source)
    return model.eval()


def write_checkpoint(
    model: DariaFormerModel,
    folder: Path,
    *,
    tokenizer: str | None,
    merge: bool,
    text: TextRecord = UNKNOWN_TEXT,
) -> None:
    """Write a model as the checkpoint of a run at step 0; `merge` puts adapters into the weights.

    Raises:
        ValueError: `merge` of a model without adapters, or added adapters without `merge`.
    """
    config, state = model.config, model.state_dict()
    has_adapters = any(".lora." in name for name in state)
    if merge != has_adapters and not (has_adapters and config.lora_rank):
        raise ValueError(
            "the checkpoint has no adapters: leave --merge_lora out"
            if merge
            else "the checkpoint has adapters that its configuration does not: use --merge_lora"
        )
    if merge:
        state = merged_state_dict(state, alpha=config.lora_alpha if config.lora_rank else None)
        plain = {"lora_rank": 0, "lora_dropout": 0.0}
        config = DariaFormerConfig.from_dict(config.to_dict() | plain)
    weights = []
    for name, info in parameter_table(FAMILY, config).items():
        tensor = state[f"body.{name}"].detach().to(torch.device("cpu"))
        weights.append(Weight(name, tuple(info.shape), tensor.dtype, info.sharding, tensor.detach))
    write_model(folder, StoredModel(folder / "weights", FAMILY, config, tokenizer, text), weights)
