"""Checkpoints of a run or of models.daria_former.training, as a DariaFormerModel."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoint import (
    StoredModel,
    load_model,
    open_checkpoint,
    parameter_table,
    write_manifest,
)
from models.daria_former.config import DariaFormerConfig
from models.daria_former.lora import LoRAManager
from models.daria_former.lora_state import SETTINGS_KEY, merged_state_dict
from models.daria_former.model import FAMILY
from models.daria_former.single import DariaFormerModel
from models.daria_former.variability import ReactionVariabilitySystem
from parallel.weights_io import ShardPosition, Weight, write_shard


def is_run(path: Path) -> bool:
    """Whether a directory is a run or one of its checkpoints, and not a Trainer's."""
    return not (path / "model.safetensors").is_file()


def load_checkpoint(path: Path, *, device: str) -> tuple[DariaFormerModel, str | None]:
    """The model, in evaluation, and the tokenizer that its data had.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or of another family.
    """
    if not is_run(path):
        values = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        model = DariaFormerModel(DariaFormerConfig.from_dict(values), device=device)
        _load(model, load_file(path / "model.safetensors"))
        return model.eval(), None
    stored = open_checkpoint(path)
    if stored.family.name != FAMILY.name:
        raise ValueError(f"{path} is a checkpoint of {stored.family.name}, not of {FAMILY.name}")
    model = DariaFormerModel(stored.config, device="meta")
    model.body = load_model(stored, device=device)
    model.variability = ReactionVariabilitySystem(stored.config).to(device)
    return model.eval(), stored.tokenizer


def _load(model: DariaFormerModel, state: dict[str, Tensor]) -> None:
    """Load a state dict whose tied tensors are there once, adapters of a LoRAManager too."""
    if model.config.weight_tying:
        first, second = "body.embedding.tokens.weight", "body.head.output.weight"
        state = {first: state[first if first in state else second], **state}
        state[second] = state[first]
    if SETTINGS_KEY in state:
        LoRAManager.from_state_dict(model, state)
    else:
        model.load_state_dict(state)


def write_checkpoint(
    model: DariaFormerModel, folder: Path, *, tokenizer: str | None, merge: bool
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
    for name, (shape, sharding) in parameter_table(FAMILY, config).items():
        tensor = state[f"body.{name}"].detach().to(torch.device("cpu"))
        weights.append(Weight(name, tuple(shape), tensor.dtype, sharding, tensor.detach))
    (folder / "weights").mkdir(parents=True)
    position = ShardPosition()
    with (folder / "weights" / position.file_name).open("wb") as file:
        write_shard(file, weights, position=position)
    write_manifest(folder, StoredModel(folder / "weights", FAMILY, config, tokenizer))
