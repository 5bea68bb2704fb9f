"""Runs of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

_OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": [],
}

Weights = dict[str, torch.Tensor]


def trained_and_resumed(
    load: Callable[[], Any],
    tokens: torch.Tensor,
    folder: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Weights, Weights]:
    """State dicts of 4 steps on rows `tokens` [b, s]: in one run, and resumed after the second."""
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)]

    def train(name: str, **resume: str) -> Weights:
        model = load()
        arguments = TrainingArguments(str(folder / name), **_OPTIONS)
        Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train(**resume)
        return model.state_dict()

    whole = train("whole")
    return whole, train("part", resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
