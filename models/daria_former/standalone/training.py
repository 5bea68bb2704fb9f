"""The published training interface: `Trainer`, the losses, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.daria_former.config import DariaFormerConfig
from models.daria_former.standalone import torch_checkpoint
from models.daria_former.standalone.loss_modules import (
    DariaFormerLoss,
    EmotionAlignmentLoss,
    MemoryConsistencyLoss,
    RepetitionPenaltyLoss,
    RhythmRegularizer,
)
from models.daria_former.standalone.model import DariaFormerModel
from models.standalone import optimizer, trainer
from models.standalone.checkpoint import load_into, rank
from models.standalone.optimizer import build_scheduler
from models.standalone.wandb_writer import WandbWriter

__all__ = [
    "Trainer",
    "DariaFormerLoss",
    "EmotionAlignmentLoss",
    "RepetitionPenaltyLoss",
    "RhythmRegularizer",
    "MemoryConsistencyLoss",
    "build_optimizer",
    "build_scheduler",
]


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    lora_lr: float | None = None,
    emotion_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW in named groups (models.standalone.optimizer): the sites of the emotion state at
    `emotion_lr` (default: lr), adapters at `lora_lr` (default: 10 lr), the rest at lr."""
    part_rates = {
        "emotion": lr if emotion_lr is None else emotion_lr,
        "lora": 10 * lr if lora_lr is None else lora_lr,
    }
    return optimizer.build_optimizer(
        model, lr, weight_decay, part_rates=part_rates, betas=betas, eps=eps
    )


class Trainer(trainer.Trainer):
    """The shared trainer (models.standalone.trainer) with the published options. Batches may also
    hold `images`, `audio` and `persona`.

    Raises:
        ValueError: a setting out of range or of another model, or a checkpoint that does not fit.
    """

    def __init__(
        self,
        model: DariaFormerModel,
        config: DariaFormerConfig,
        train_dataloader: Iterable[Any],
        eval_dataloader: Iterable[Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        max_steps: int = 100_000,
        warmup_steps: int = 0,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 1.0,
        use_amp: bool = False,
        save_dir: str | Path | None = None,
        save_every: int = 1000,
        eval_every: int = 1000,
        log_every: int = 10,
        use_wandb: bool = False,
        wandb_project: str = "daria-former",
        resume_from: str | Path | None = None,
    ) -> None:
        folder = None if save_dir is None else Path(save_dir)
        settings = trainer.TrainerSettings(
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_grad_norm=max_grad_norm,
            use_amp=use_amp,
            save_dir=folder,
            save_every=save_every,
            eval_every=eval_every,
            log_every=log_every,
        )
        if config != model.config:
            raise ValueError(
                "config differs from model.config, which the model was built with; pass "
                "model.config"
            )
        adamw = build_optimizer(model, lr, weight_decay)
        super().__init__(model, settings, train_dataloader, eval_dataloader, optimizer=adamw)
        if use_wandb and rank() == 0:
            self.writer = WandbWriter(wandb_project, config.to_dict(), folder)
        if resume_from is not None:
            self.load(Path(resume_from))

    def load(self, folder: Path) -> None:
        """Continue a checkpoint, also one of the previous version (see the shared trainer)."""
        if not torch_checkpoint.is_torch_checkpoint(folder):
            super().load(folder)
            return
        config, weights = torch_checkpoint.read_model(folder)
        if config != self.model.config:
            raise ValueError(f"{folder} is of another configuration; build the model from its own")
        state = torch_checkpoint.read_training_state(folder)
        load_into(self.model, weights, source=folder / "model.safetensors")
        self.restore(state, source=folder)
