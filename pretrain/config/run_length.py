"""The length of a run: number of steps, and the batch of each."""

from __future__ import annotations

from data_tools.errors import DataError
from data_tools.sampling.curriculum import START, BatchStep, Curriculum, Position, plan_curriculum
from pretrain.config.errors import listed
from pretrain.config.schema import RunConfig
from pretrain.errors import ConfigError


def plan_run(
    config: RunConfig,
    *,
    data_size: int,
    num_tokens: int | None = None,
    start: Position = START,
) -> Curriculum:
    """Plan the steps of a run from `start` on; opens no data.

    Args:
        data_size: data ranks of the run.
        num_tokens: tokens of data.train, each source counted once; needed for training.max_epochs.
        start: steps, samples and tokens the run has already taken.

    Raises:
        ConfigError: a stage has no steps, warmup and decay take the whole run, a batch size is
            impossible at this layout, or steps to profile are not of the run.
    """
    training = config.training
    sequences_per_step = training.batch_size * training.gradient_accumulation_steps * data_size
    _check_ramp(config, data_size, start)
    try:
        curriculum = plan_curriculum(
            config.data,
            sequences_per_step=sequences_per_step,
            max_steps=training.max_steps,
            max_tokens=_max_tokens(config, num_tokens),
            ramp=[
                BatchStep(each.until_tokens, each.sequences_per_step)
                for each in training.batch_ramp
            ],
            start=start,
        )
    except DataError as error:
        raise ConfigError(str(error)) from error
    ramps = training.warmup_steps + training.decay_steps
    if start == START and ramps >= curriculum.total_steps:
        raise ConfigError(
            f"the run has {curriculum.total_steps} steps, not more than training.warmup_steps + "
            f"training.decay_steps = {ramps}; shorten the ramps or train longer"
        )
    _check_profile(config, curriculum.total_steps)
    return curriculum


def _check_profile(config: RunConfig, total_steps: int) -> None:
    for first, last in config.logging.profile_steps:
        if last > total_steps:
            raise ConfigError(
                f"logging.profile_steps has [{first}, {last}], but the run has {total_steps} "
                "steps; choose steps of the run"
            )


def check_length(config: RunConfig, *, data_size: int) -> None:
    """Check the plan of the steps as far as possible without opening the data.

    With training.max_epochs their number depends on the data, and only `plan_run` can check it.

    Raises:
        ConfigError: see `plan_run`.
    """
    if config.training.max_epochs is None:
        plan_run(config, data_size=data_size)
    else:
        _check_ramp(config, data_size, START)


def _max_tokens(config: RunConfig, num_tokens: int | None) -> int | None:
    """The smaller limit of max_tokens and max_epochs; None if both are unset."""
    limits = [config.training.max_tokens]
    if config.training.max_epochs is not None:
        assert num_tokens is not None, "training.max_epochs needs the number of tokens"
        limits.append(round(config.training.max_epochs * num_tokens))
    return min((limit for limit in limits if limit is not None), default=None)


def _check_ramp(config: RunConfig, data_size: int, start: Position) -> None:
    training = config.training
    per_round = training.batch_size * data_size
    full = per_round * training.gradient_accumulation_steps
    for number, step in enumerate(training.batch_ramp):
        if start.tokens < step.until_tokens:
            name = f"training.batch_ramp.{number}.sequences_per_step"
            _check_size(name, step.sequences_per_step, per_round, full)


def _check_size(name: str, size: int, per_round: int, full: int) -> None:
    """Check that a step is whole micro-batches on every data rank and below the full batch."""
    if size % per_round:
        nearest = [
            n for n in (size // per_round * per_round, -(-size // per_round) * per_round) if n
        ]
        raise ConfigError(
            f"{name}={size} is not a multiple of {per_round}, which is training.batch_size x data "
            f"ranks; nearest are {listed(nearest)}"
        )
    if size >= full:
        raise ConfigError(
            f"{name}={size} is not less than the full batch of {full}, which is "
            "training.batch_size x gradient_accumulation_steps x data ranks; raise "
            "gradient_accumulation_steps or shorten the ramp"
        )
