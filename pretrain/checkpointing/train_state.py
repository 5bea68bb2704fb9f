"""Trainer state (trainer.json): everything in a run that is not a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data_tools.loading.builders import check_epochs
from data_tools.loading.loader import TrainLoader
from data_tools.loading.loader_state import LoaderState
from data_tools.sampling.curriculum import Curriculum, Position
from parallel.checkpoint.errors import CheckpointError
from pretrain.config import RunConfig
from pretrain.config.errors import show
from pretrain.config.run_length import plan_run

# Settings of `training` that end a run.
LIMITS = ("max_steps", "max_tokens", "max_epochs")


class Stateful(Protocol):
    """An owner of checkpointed state."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""


# An owner of state, and its section of trainer.json; None: the top level. Owners may share one.
Owner = tuple[str | None, Stateful]


def save_states(owners: Sequence[Owner]) -> dict[str, Any]:
    """The content of trainer.json."""
    trainer: dict[str, Any] = {}
    for section, owner in owners:
        place = trainer if section is None else trainer.setdefault(section, {})
        place |= owner.state_dict()
    return trainer


def load_states(owners: Sequence[Owner], trainer: Mapping[str, Any]) -> None:
    """Restore every owner from the content of trainer.json; a section may be missing.

    Raises:
        CheckpointError, ConfigError, DataError: the run cannot continue from it.
    """
    for section, owner in owners:
        owner.load_state_dict(trainer if section is None else trainer.get(section, {}))


class TrainState:
    """Progress of a run: steps, learning rate and position in the data.

    `loader` holds the position and the plan of the steps (`curriculum`). After a restart the plan
    continues from the restored position, with the current settings.

    Args:
        data_size: data ranks of the run.
    """

    def __init__(self, config: RunConfig, loader: TrainLoader, *, data_size: int) -> None:
        self._config, self._data_size = config, data_size
        self.loader = loader
        self.step = 0
        self.learning_rate = 0.0  # of that step

    @property
    def curriculum(self) -> Curriculum:
        return self.loader.curriculum

    @property
    def total_steps(self) -> int:
        return self.curriculum.total_steps

    @property
    def tokens(self) -> int:
        """Tokens seen by all ranks so far."""
        return self.curriculum.tokens_after(self.step)

    def samples_of(self, step: int) -> range:
        """Indices in the run of the samples of a step, over all ranks."""
        first, end = (self.curriculum.position_after(n).samples for n in (step - 1, step))
        return range(first, end)

    def state_dict(self) -> dict[str, Any]:
        """The counts after the last step and the position in the data, as plain JSON."""
        last = self.curriculum.stage_after(max(self.step - 1, self.curriculum.start.steps))
        return {
            "step": self.step,
            "tokens": self.tokens,
            "learning_rate": self.learning_rate,
            "total_steps": self.total_steps,
            "sequences_per_step": last.sequences_per_step,
            "data": self.loader.state_dict(),
        }

    def plan_from(self, state: Mapping[str, Any]) -> Curriculum:
        """Plan the steps after those of `state`, under the current settings.

        Raises:
            CheckpointError, ConfigError, DataError: the run cannot continue there.
        """
        position = position_of(state)
        curriculum = plan_run(
            self._config,
            data_size=self._data_size,
            num_tokens=count_tokens(self.loader),
            start=position,
        )
        self._check_end(curriculum, position)
        return curriculum

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with the steps that remain under the current settings.

        Raises:
            CheckpointError, ConfigError, DataError: the run cannot continue there.
        """
        curriculum = self.plan_from(state)
        self.loader.load_state_dict(state["data"], curriculum=curriculum)
        check_epochs(self._config.data, curriculum, self.loader)
        self.step, self.learning_rate = curriculum.start.steps, last_rate(state)

    def _check_end(self, curriculum: Curriculum, position: Position) -> None:
        if curriculum.total_steps >= position.steps:
            return
        training = self._config.training
        limits = ", ".join(
            f"training.{name}={value:g}"
            for name in LIMITS
            if (value := getattr(training, name)) is not None
        )
        raise CheckpointError(
            f"with {limits} the run ends after {curriculum.total_steps} steps, and the checkpoint "
            f"in {self._config.run_dir!r} has taken {position.steps}: train longer, or choose "
            "another run_dir"
        )


def count_tokens(loader: TrainLoader) -> int:
    """Total tokens of the training sources, each counted once."""
    return sum(stream.num_tokens for _, stream in loader.sources)


def position_of(state: Mapping[str, Any]) -> Position:
    """The steps, samples and tokens that a `TrainState.state_dict` was taken after.

    Raises:
        CheckpointError, DataError: the state is incomplete.
    """
    samples = LoaderState.parse(state.get("data", {})).consumed_samples
    step, tokens = state.get("step"), state.get("tokens")
    if not (isinstance(step, int) and isinstance(tokens, int) and 0 <= samples <= tokens):
        raise CheckpointError(
            f"the checkpoint of step {show(step)} has seen {show(tokens)} tokens in "
            f"{show(samples)} samples, which no run has: resume from another checkpoint"
        )
    return Position(step, samples, tokens)


def last_rate(state: Mapping[str, Any]) -> float:
    """The learning rate of the last step; 0 in older checkpoints, which lack it."""
    rate = state.get("learning_rate", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0
