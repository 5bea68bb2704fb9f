"""trainer.json: written and restored by the same owners, also from earlier versions."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.loading.loader import TrainLoader
from parallel.checkpoint.errors import CheckpointError
from parallel.context import Axis
from pretrain.checkpointing.train_state import (
    Owner,
    TrainState,
    load_states,
    save_states,
)
from pretrain.config import RunConfig, parse_config
from pretrain.distributed.consensus import RankGroup
from pretrain.run_data import open_training_data
from pretrain.stability.nonfinite_steps import SkipNonFinite
from pretrain.stability.rollback import Rollback
from tests.data_tools.corpora import write_corpus
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused

# As it was written before its owners had a state_dict: 3 steps of 4 samples of 16 tokens.
OLD = """
{
 "step": 3,
 "tokens": 192,
 "learning_rate": 0.0008,
 "total_steps": 10,
 "sequences_per_step": 4,
 "data": {
  "version": 2,
  "consumed_samples": 12,
  "seed": 1234,
  "sequence_length": 16,
  "sources": {
   "train": {
    "position": 192,
    "tokens": 192,
    "fingerprint": "FINGERPRINT"
   }
  },
  "mix": {
   "weights": {"train": 1.0},
   "sequence_length": 16,
   "start_sample": 0,
   "base": {"train": 0},
   "given": {}
  }
 },
 "stability": {
  "num_skipped": 2,
  "in_a_row": 1,
  "left_out": [[4, 6]],
  "losses": [3.5, 3.25]
 }
}
"""


class _Run:
    """The owners of trainer.json in a run without a model."""

    def __init__(self, config: RunConfig) -> None:
        self.loader: TrainLoader = open_training_data(config, Axis())
        self.state = TrainState(config, self.loader, data_size=1)
        self.steps = SkipNonFinite(None, self.loader, RankGroup(), max_skipped=3)  # type: ignore[arg-type]
        self.rollback = Rollback(config.stability, self.state, RankGroup())
        self.owners: list[Owner] = [
            (None, self.state), ("stability", self.steps), ("stability", self.rollback)
        ]  # fmt: skip

    def step(self) -> list[list[int]]:
        """Draw the batches of a step; their tokens."""
        tokens = [row for _ in range(2) for row in next(self.loader).tokens.tolist()]
        self.state.step, self.state.learning_rate = self.state.step + 1, 8e-4
        return tokens


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    write_corpus(tmp_path / "train", [np.arange(2000) % 4096], vocab_size=4096)
    return parse_config(
        run_values(
            data__train=str(tmp_path / "train"),
            data__validation=[],
            data__sequence_length=16,
            training__gradient_accumulation_steps=2,
            stability__spike={"sigma": 5.0, "window": 2, "skip_before": 1},
            checkpoint__interval=2,
        )
    )


@pytest.fixture
def run(config: RunConfig) -> Iterator[_Run]:
    run = _Run(config)
    yield run
    run.loader.close()


def _old(run: _Run) -> dict[str, Any]:
    return json.loads(OLD.replace("FINGERPRINT", run.loader.fingerprints["train"]))


def test_the_file_of_an_earlier_version_is_what_is_written_today(run: _Run) -> None:
    expected = _old(run)
    for _ in range(3):
        run.step()
    run.steps.load_state_dict(expected["stability"])
    run.rollback.load_state_dict(expected["stability"])
    expected["stability"]["left_out_samples"] = [None]  # since then, where they are known
    assert json.loads(json.dumps(save_states(run.owners))) == expected


def test_a_run_goes_on_from_the_file_of_an_earlier_version(run: _Run, config: RunConfig) -> None:
    uninterrupted = [run.step() for _ in range(5)]
    again = _Run(config)
    load_states(again.owners, _old(run))
    assert (again.state.step, again.state.tokens) == (3, 192)
    assert again.state.learning_rate == 8e-4
    assert again.state.total_steps == 10
    assert (again.steps.num_skipped, again.steps.in_a_row) == (2, 1)
    assert again.rollback.skipped_steps == [(4, 6)]
    spike = again.rollback.find_spike({4: torch.tensor(1e3)})
    assert spike is not None, "the losses of the window are restored"
    assert [again.step() for _ in range(2)] == uninterrupted[3:]
    again.loader.close()


def test_what_is_saved_is_what_is_restored(run: _Run, config: RunConfig) -> None:
    load_states(run.owners, _old(run))
    run.step()
    saved = copy.deepcopy(save_states(run.owners))
    again = _Run(config)
    load_states(again.owners, saved)
    assert save_states(again.owners) == saved
    assert again.step() == run.step()
    again.loader.close()


def test_files_without_the_sections_of_later_versions_still_load(run: _Run) -> None:
    old = _old(run)
    del old["stability"], old["learning_rate"], old["total_steps"], old["sequences_per_step"]
    load_states(run.owners, old)
    assert (run.state.step, run.state.learning_rate) == (3, 0.0)
    assert (run.steps.num_skipped, run.steps.in_a_row, run.rollback.skipped) == (0, 0, [])


def test_restoring_forgets_what_came_after(run: _Run) -> None:
    """A rollback restores into the owners of the attempt that went wrong."""
    old = _old(run)
    for _ in range(5):
        run.step()
    assert run.rollback.find_spike({5: torch.tensor(7.0)}) is None, "the window is not full"
    run.steps.in_a_row = 3
    load_states(run.owners, old)
    old["stability"]["left_out_samples"] = [None]
    assert json.loads(json.dumps(save_states(run.owners))) == old


def test_a_run_that_would_end_before_its_checkpoint_is_refused(run: _Run) -> None:
    shorter = run.state._config.model_copy(
        update={"training": run.state._config.training.model_copy(update={"max_steps": 2})}
    )
    state = TrainState(shorter, run.loader, data_size=1)
    with assert_refused(
        "training.max_steps", value=2, constraint="3", remedy="run_dir", error=CheckpointError
    ):
        state.load_state_dict(_old(run))
