"""A run that goes on from a checkpoint: from where it counts, and what it says has changed."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.loading.builders import check_epochs
from data_tools.loading.loader import TrainLoader
from data_tools.loading.loader_state import LoaderState
from data_tools.sampling.curriculum import Position
from pretrain.checkpointing import Checkpoint, CheckpointError
from pretrain.config import RunConfig
from pretrain.config.errors import show
from pretrain.config.layout import RunLayout
from pretrain.config.resume_rules import MISSING, Difference
from pretrain.engine.lr_schedule import learning_rate

_OF_THE_COMMAND = ("run_dir", "resume")
_LIMITS = ("max_steps", "max_tokens", "max_epochs")
_UNUSED = "training.init_from"
# What decides the learning rate of a step, beside the number of steps of the run.
_OF_THE_RATE = ("lr", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio")
_OF_THE_BATCH = ("batch_size", "gradient_accumulation_steps", "batch_ramp")


def go_on_from(
    checkpoint: Checkpoint, config: RunConfig, layout: RunLayout, loader: TrainLoader
) -> RunLayout:
    """Move the loader to where `checkpoint` was taken; returns the layout with the steps left.

    Raises:
        CheckpointError, ConfigError, DataError: the run cannot go on there.
    """
    position = position_of(checkpoint)
    layout = layout.continued(config, position)
    if layout.total_steps < position.steps:
        limits = ", ".join(
            f"training.{name}={value:g}"
            for name in _LIMITS
            if (value := getattr(config.training, name)) is not None
        )
        raise CheckpointError(
            f"with {limits} the run ends after {layout.total_steps} steps, and "
            f"{str(checkpoint.path)!r} has taken {position.steps}: train longer, or choose another "
            "run_dir"
        )
    loader.load_state_dict(checkpoint.trainer["data"], curriculum=layout.curriculum)
    check_epochs(config.data, layout.curriculum, loader)
    return layout


def position_of(checkpoint: Checkpoint) -> Position:
    """The steps, samples and tokens that `checkpoint` was taken after.

    Raises:
        CheckpointError, DataError: it does not say.
    """
    samples = LoaderState.parse(checkpoint.trainer.get("data", {})).consumed_samples
    tokens = checkpoint.trainer.get("tokens")
    if not isinstance(tokens, int) or not 0 <= samples <= tokens:
        raise CheckpointError(
            f"{str(checkpoint.path)!r} has seen {show(tokens)} tokens in {show(samples)} samples, "
            "which no run has: resume from another checkpoint"
        )
    return Position(checkpoint.step, samples, tokens)


def last_rate(checkpoint: Checkpoint) -> float:
    """The learning rate of the checkpoint's last step; 0 in older ones, which do not say."""
    rate = checkpoint.trainer.get("learning_rate", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0


def changes_told(checkpoint: Checkpoint, config: RunConfig, layout: RunLayout) -> list[str]:
    """A line for everything that is not as it was: old -> new.

    `layout`: with the steps left, from `go_on_from`.
    """
    names = {each.key.removeprefix("training.") for each in checkpoint.differences}
    return [
        *(_told(each) for each in checkpoint.differences if each.key not in _OF_THE_COMMAND),
        *_batch_told(checkpoint, layout, names),
        *_rate_told(checkpoint, config, layout, names),
    ]


def _told(difference: Difference) -> str:
    values = (difference.old, difference.new)
    old, new = ("none" if x in (None, MISSING) else show(x, longest=400) for x in values)
    unused = ", which has no effect: the weights are the checkpoint's"
    return f"{difference.key}: {old} -> {new}{unused * difference.key.startswith(_UNUSED)}"


def _batch_told(checkpoint: Checkpoint, layout: RunLayout, names: set[str]) -> Iterator[str]:
    step, stage = checkpoint.step, layout.curriculum.stages[0]
    if step == layout.total_steps:
        return
    before = checkpoint.trainer.get("sequences_per_step")
    is_changed = names & {*_OF_THE_BATCH} or checkpoint.layout.data != layout.data
    if is_changed and isinstance(before, int) and before != stage.sequences_per_step:
        yield (
            f"sequences per step: {before} in step {step} -> {stage.sequences_per_step} in step "
            f"{step + 1}"
        )


def _rate_told(
    checkpoint: Checkpoint, config: RunConfig, layout: RunLayout, names: set[str]
) -> Iterator[str]:
    step, total = checkpoint.step, layout.total_steps
    if not names & {*_OF_THE_RATE, *_LIMITS} and checkpoint.trainer.get("total_steps") == total:
        return
    if step < total and (before := last_rate(checkpoint)):
        after = learning_rate(step + 1, config.training, total_steps=total)
        yield f"learning rate: {before:.3g} in step {step} -> {after:.3g} in step {step + 1}"
