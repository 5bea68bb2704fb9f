"""The checkpoint layout of the version before, whose training state torch.save wrote."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_model

from models.daria_former.standalone.training import Trainer
from models.standalone.trainer import _get_random


def write_torch_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Write config.yaml, model.safetensors and training_state.pt of one process."""
    folder.mkdir(parents=True)
    save_model(trainer.model, str(folder / "model.safetensors"))
    ranks = [{"batches": trainer.batches.state_dict(), "random": _get_random()}]
    state = {"optimizer": trainer.optimizer.state_dict(), "step": trainer.step, "ranks": ranks}
    state["scheduler"] = trainer.scheduler.state_dict()
    torch.save(state, folder / "training_state.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(trainer.model.config.to_dict()))
