"""The published training runs: the shared trainer, with their files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from models.agiformer.standalone.model import AGIFORMER, save_model
from models.standalone.trainer import Trainer


class RecordedTrainer(Trainer):
    """A trainer that writes, at every evaluation and at the end, into `folder`:

    `best_model_NAME.pth`, `last_model_NAME.pth` and `metrics_NAME.json`, lists `steps`,
    `train_bpc`, `val_bpc`, `lr`, and `plasticity` with a curriculum; without one, which is
    evaluated often, `checkpoint_step_N.pth` as well. bpc are bits per byte, of the latest step and
    of the whole held-out file.
    """

    model: AGIFORMER

    def __init__(
        self,
        *arguments: Any,
        name: str,
        folder: Path,
        plasticity: Callable[[int], float] | None = None,
        **options: Any,
    ) -> None:
        """`plasticity(step)`: of the step after so many."""
        super().__init__(*arguments, **options)
        self.name, self.folder, self.plasticity = name, folder, plasticity
        keys = ["steps", "train_bpc", "val_bpc", "lr"]
        self.metrics: dict[str, list[float]] = {key: [] for key in keys}
        if plasticity is not None:
            self.metrics["plasticity"] = []
        self._latest = (math.nan, 0.0)  # bits per byte and learning rate
        folder.mkdir(parents=True, exist_ok=True)

    def train(self) -> list[dict[str, float]]:
        """Train to `max_steps`, and evaluate the end as well where it lies between two
        evaluations: the last model is that of the last step."""
        super().train()
        if self.eval_dataloader is not None and self.metrics["steps"][-1:] != [self.step]:
            self._log({"eval_loss": self.evaluate()})
        return self.history

    def _train_step(self) -> dict[str, Tensor]:
        if self.plasticity is not None:
            self.model.set_plasticity(self.plasticity(self.step))
        rate = float(self.scheduler.get_last_lr()[0])
        terms = super()._train_step()
        self._latest = (float(terms["lm_loss"]) / math.log(2), rate)
        return terms

    def _log(self, values: dict[str, float]) -> None:
        """Losses are in nats; an evaluation is printed in bits per byte as well."""
        if "eval_loss" not in values:
            super()._log(values)
            return
        bits = values["eval_loss"] / math.log(2)
        super()._log({**values, "val_bpc": bits})
        self.record(bits)

    def record(self, bits: float) -> None:
        """Write the files of an evaluation of `bits` per byte."""
        best = min(self.metrics["val_bpc"], default=math.inf)
        entry = {"steps": self.step, "train_bpc": self._latest[0], "val_bpc": bits}
        entry["lr"] = self._latest[1]
        if self.plasticity is not None:
            entry["plasticity"] = self.plasticity(self.step - 1)
        for key, value in entry.items():
            self.metrics[key].append(value)
        names = [f"last_model_{self.name}"]
        if self.plasticity is None:
            names.append(f"checkpoint_step_{self.step}")
        if bits < best:
            names.append(f"best_model_{self.name}")
        for name in names:
            save_model(self.model, self.folder / f"{name}.pth")
        (self.folder / f"metrics_{self.name}.json").write_text(json.dumps(self.metrics, indent=1))
