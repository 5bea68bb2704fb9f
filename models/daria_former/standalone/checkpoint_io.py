"""Checkpoints of a run or of models.daria_former.standalone.training, as a DariaFormerModel."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
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
from models.daria_former.model import FAMILY
from models.daria_former.standalone.config_file import read_config
from models.daria_former.standalone.logits_processor import ReactionVariabilitySystem
from models.daria_former.standalone.lora import LoRAManager
from models.daria_former.standalone.lora_state import SETTINGS_KEY, merged_state_dict
from models.daria_former.standalone.model import DariaFormerModel
from parallel.checkpoint.manifest import UNKNOWN_TEXT, TextRecord
from parallel.checkpoint.weights import ShardPosition, Weight, write_shard


def is_run(path: Path) -> bool:
    """Whether a directory is a run or one of its checkpoints, and not a Trainer's."""
    return not (path / "model.safetensors").is_file()


class Loaded(NamedTuple):
    """A model, in evaluation, the tokenizer of its data, and how that became tokens."""

    model: DariaFormerModel
    tokenizer: str | None
    text: TextRecord


def load_checkpoint(path: Path, *, device: str) -> Loaded:
    """A model and what its checkpoint says of its data.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or of another family.
    """
    if not is_run(path):
        model = DariaFormerModel(read_trainer_config(path), device=device)
        load_trainer_weights(model, path, add_adapters=True)
        return Loaded(model.eval(), None, UNKNOWN_TEXT)
    stored = open_checkpoint(path)
    if stored.family.name != FAMILY.name:
        raise ValueError(f"{path} is a checkpoint of {stored.family.name}, not of {FAMILY.name}")
    model = DariaFormerModel(stored.config, device="meta")
    model.body = load_model(stored, device=device)
    model.variability = ReactionVariabilitySystem(stored.config).to(device)
    return Loaded(model.eval(), stored.tokenizer, stored.text)


def read_trainer_config(folder: Path) -> DariaFormerConfig:
    """The configuration of a Trainer's checkpoint.

    Raises:
        ValueError: the folder is none, or its configuration is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file() or is_run(folder):
        raise ValueError(
            f"{folder} is no checkpoint of a Trainer; give a folder checkpoint-N with config.yaml "
            "and model.safetensors"
        )
    return read_config(path)


def load_trainer_weights(model: DariaFormerModel, folder: Path, *, add_adapters: bool) -> None:
    """Load `model.safetensors` of a Trainer's checkpoint into a model of its configuration.

    `add_adapters`: whether the model gets those of a LoRAManager that the file has; it then has
    none yet. Else it must have the same ones.

    Raises:
        ValueError: the file is damaged, or what is in it is not what the model has.
    """
    path = folder / "model.safetensors"
    try:
        state = _with_tied(model, load_file(path))
        if add_adapters and SETTINGS_KEY in state:
            LoRAManager.from_state_dict(model, state)
        else:
            model.load_state_dict(state)
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} cannot be loaded: it is damaged, or of a model with other adapters or another "
            f"configuration ({reason})"
        ) from error


def _with_tied(model: DariaFormerModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which a tied tensor is under both of its names; files hold it once."""
    if not model.config.weight_tying:
        return state
    first, second = "body.embedding.tokens.weight", "body.head.output.weight"
    table = state[first if first in state else second]
    return {**state, first: table, second: table}


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
    (folder / "weights").mkdir(parents=True)
    position = ShardPosition()
    with (folder / "weights" / position.file_name).open("wb") as file:
        write_shard(file, weights, position=position)
    write_manifest(folder, StoredModel(folder / "weights", FAMILY, config, tokenizer, text))
