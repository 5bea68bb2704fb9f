"""Report of the changes since the checkpoint that a run continues from."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.sampling.curriculum import Curriculum
from pretrain.checkpointing.selection import Checkpoint
from pretrain.checkpointing.train_state import LIMITS, last_rate
from pretrain.config import RunConfig
from pretrain.config.errors import show
from pretrain.config.layout import RunLayout
from pretrain.config.resume_rules import MISSING, Difference
from pretrain.engine.lr_schedule import learning_rate

_COMMAND_SETTINGS = ("run_dir", "resume")
_UNUSED_AT_RESUME = "training.init_from"
# Settings of the learning rate, besides the number of steps of the run.
_RATE_SETTINGS = ("lr", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio")
_BATCH_SETTINGS = ("batch_size", "gradient_accumulation_steps", "batch_ramp")


def describe_changes(
    checkpoint: Checkpoint, config: RunConfig, layout: RunLayout, curriculum: Curriculum
) -> list[str]:
    """One line per change since the checkpoint: old -> new. `curriculum`: the remaining steps."""
    names = {each.key.removeprefix("training.") for each in checkpoint.differences}
    return [
        *(_describe(each) for each in checkpoint.differences if each.key not in _COMMAND_SETTINGS),
        *_describe_batch(checkpoint, layout, curriculum, names),
        *_describe_rate(checkpoint, config, curriculum, names),
    ]


def _describe(difference: Difference) -> str:
    values = (difference.old, difference.new)
    old, new = ("none" if x in (None, MISSING) else show(x, longest=400) for x in values)
    unused = ", which has no effect: the weights are the checkpoint's"
    return (
        f"{difference.key}: {old} -> {new}{unused * difference.key.startswith(_UNUSED_AT_RESUME)}"
    )


def _describe_batch(
    checkpoint: Checkpoint, layout: RunLayout, curriculum: Curriculum, names: set[str]
) -> Iterator[str]:
    step, stage = checkpoint.step, curriculum.stages[0]
    if step == curriculum.total_steps:
        return
    before = checkpoint.trainer.get("sequences_per_step")
    is_changed = names & {*_BATCH_SETTINGS} or checkpoint.layout.data != layout.data
    if is_changed and isinstance(before, int) and before != stage.sequences_per_step:
        yield (
            f"sequences per step: {before} in step {step} -> {stage.sequences_per_step} in step "
            f"{step + 1}"
        )


def _describe_rate(
    checkpoint: Checkpoint, config: RunConfig, curriculum: Curriculum, names: set[str]
) -> Iterator[str]:
    step, total = checkpoint.step, curriculum.total_steps
    if not names & {*_RATE_SETTINGS, *LIMITS} and checkpoint.trainer.get("total_steps") == total:
        return
    if step < total and (before := last_rate(checkpoint.trainer)):
        after = learning_rate(step + 1, config.training, total_steps=total)
        yield f"learning rate: {before:.3g} in step {step} -> {after:.3g} in step {step + 1}"
