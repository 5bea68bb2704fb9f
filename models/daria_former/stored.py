"""Checkpoints of a run or of models.daria_former.training, as a DariaFormerModel."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_model as load_safetensors

from models.checkpoint import (
    StoredModel,
    load_model,
    open_checkpoint,
    parameter_table,
    write_manifest,
)
from models.daria_former.config import DariaFormerConfig
from models.daria_former.lora import merged_state_dict
from models.daria_former.model import FAMILY
from models.daria_former.single import DariaFormerModel
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
        load_safetensors(model, str(path / "model.safetensors"))
        return model.eval(), None
    stored = open_checkpoint(path)
    if stored.family.name != FAMILY.name:
        raise ValueError(f"{path} is a checkpoint of {stored.family.name}, not of {FAMILY.name}")
    model = DariaFormerModel(stored.config, device="meta")
    model.body = load_model(stored, device=device)
    return model.eval(), stored.tokenizer


def write_checkpoint(
    model: DariaFormerModel, folder: Path, *, tokenizer: str | None, merge: bool
) -> None:
    """Write a model as the checkpoint of a run at step 0; `merge` puts adapters into the weights.

    Raises:
        ValueError: `merge` of a model without adapters.
    """
    config, state = model.config, model.body.state_dict()
    if merge:
        if config.lora_rank == 0:
            raise ValueError(
                "--merge_lora has no effect: the checkpoint has no adapters (lora_rank=0)"
            )
        state = merged_state_dict(model.body)
        plain = {"lora_rank": 0, "lora_dropout": 0.0}
        config = DariaFormerConfig.from_dict(config.to_dict() | plain)
    weights = []
    for name, (shape, sharding) in parameter_table(FAMILY, config).items():
        tensor = state[name].detach().to(torch.device("cpu"))
        weights.append(Weight(name, tuple(shape), tensor.dtype, sharding, tensor.detach))
    (folder / "weights").mkdir(parents=True)
    position = ShardPosition()
    with (folder / "weights" / position.file_name).open("wb") as file:
        write_shard(file, weights, position=position)
    write_manifest(folder, StoredModel(folder / "weights", FAMILY, config, tokenizer))
