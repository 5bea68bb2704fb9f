"""Weights & Biases, set up so that only configuration and numbers leave the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def start_wandb(**options: Any) -> Any:
    """A run of `wandb.init(**options)` without console capture, source code, environment or
    command line."""
    import wandb  # an optional dependency

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
    )
    return wandb.init(**options, settings=settings)


class WandbWriter:
    """Records of a Trainer as a run in `folder`; make it on rank 0 alone."""

    def __init__(self, project: str, config: Mapping[str, Any], folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._run = start_wandb(project=project, config=dict(config), dir=folder)

    def write(self, record: Mapping[str, float]) -> None:
        values = {name: value for name, value in record.items() if name != "step"}
        self._run.log(values, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()
