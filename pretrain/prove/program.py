"""The parallel side: the real program, started as a launcher starts it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import train
from pretrain.config import RunConfig, to_yaml
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED, EXIT_USER_ERROR
from pretrain.prove.choices import Choices, read_choices, recorded
from pretrain.prove.errors import RunFailedError
from pretrain.prove.ranks import Forks, run_ranks

RUN_FILE = "prove"


class Leg(NamedTuple):
    """One start of the program: its settings, DeepSpeed file and number of ranks.

    `last_step`: after which it is stopped; None: it ends.
    """

    name: str
    config: RunConfig
    ds_config_values: dict[str, Any]
    ranks: int
    last_step: int | None = None

    @property
    def data_size(self) -> int:
        return self.ranks // (self.config.parallel.tensor * self.config.parallel.pipeline)

    @property
    def layout(self) -> str:
        """Such as `tensor 2 x data 2, ZeRO-1`."""
        parallel = self.config.parallel
        sizes = {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "data": self.data_size,
            "expert": parallel.expert,
        }
        axes = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one rank"]
        zero = self.ds_config_values.get("zero_optimization", {})
        offload = [k for k in zero if k.startswith("offload")]
        return ", ".join([
            " x ".join(axes) + " (sequence parallel)" * parallel.sequence_parallel,
            f"ZeRO-{zero.get('stage', 0)}", *offload,
        ])  # fmt: skip


def train_leg(
    leg: Leg, folder: Path, forks: Forks, *, timeout: float, resume_from: Path | None = None
) -> Path:
    """Train `leg` below `folder`, from a copy of the checkpoint `resume_from` if given.

    Returns its run directory.

    Raises:
        ValueError: the program refuses a setting before it has built the model.
        RunFailedError: a rank failed; one line names it.
    """
    place = folder / leg.name
    run_dir = place / "run"
    run_dir.mkdir(parents=True)
    config = leg.config.model_copy(
        update={"run_dir": str(run_dir), "resume": "must" if resume_from else "never"}
    )
    (place / f"{RUN_FILE}.yaml").write_text(to_yaml(config))
    (place / "ds.json").write_text(json.dumps(leg.ds_config_values))
    if resume_from is not None:
        shutil.copytree(resume_from, run_dir / "checkpoints" / resume_from.name)
    command = ["--config-dir", str(place), "--config-name", RUN_FILE]
    command += ["--ds_config", str(place / "ds.json")]
    choices = place / "choices"
    choices.mkdir()

    def program() -> int:
        code = train.main(command, last_step=leg.last_step)
        was_stopped = leg.last_step is not None and code == EXIT_STOPPED
        return EXIT_COMPLETED if was_stopped else code

    def main() -> int:
        return recorded(program, choices / f"rank_{os.environ['RANK']}.pt")

    try:
        run_ranks(forks, main, size=leg.ranks, logs=place / "logs", timeout=timeout)
    except RunFailedError as error:
        is_built = (run_dir / "config.yaml").exists()
        if resume_from is None and error.code == EXIT_USER_ERROR and not is_built:
            raise ValueError(str(error)) from error
        raise
    return run_dir


def choices_of(run_dir: Path, leg: Leg, sequences: Mapping[int, int]) -> dict[int, list[Choices]]:
    """The choices of layers in a trained leg, by step. `sequences`: of every step that it trained.

    Raises:
        ValueError: ranks have not chosen equally often in every micro-batch.
    """
    parallel, per_round = leg.config.parallel, leg.config.training.batch_size * leg.data_size
    chosen = read_choices(
        [run_dir.parent / "choices" / f"rank_{rank}.pt" for rank in range(leg.ranks)],
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        micro_batches=[number // per_round for number in sequences.values()],
    )
    return dict(zip(sequences, chosen, strict=True))
