"""A run whose loss spikes."""

from __future__ import annotations

import pretrain.engine.train_spec
from pretrain.config import RunConfig
from pretrain.errors import TrainingError
from pretrain.loop import TrainLoop
from tests.pretrain.run_training import run_training


def run_spiking(config: RunConfig, ds_config_path: str | None, steps: tuple[int, ...]) -> int | str:
    """`run`, in which the loss of some steps is a hundred times as large as it should be."""
    now = 0
    train, objective = TrainLoop._train, pretrain.engine.train_spec.TrainSpec.objective

    def noted(self, step, *args):
        nonlocal now
        now = step
        return train(self, step, *args)

    def multiplied(self, output, targets):
        total, terms = objective(self, output, targets)
        return (total * 100, terms) if now in steps else (total, terms)

    TrainLoop._train = noted
    pretrain.engine.train_spec.TrainSpec.objective = multiplied
    try:
        return run_training(config, ds_config_path)
    except TrainingError as error:
        return str(error)
