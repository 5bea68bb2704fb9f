"""Whether a run fits on the processes that were started, and what follows from their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data_tools.errors import DataError
from data_tools.sampling.curriculum import START, BatchStep, Curriculum, Position, plan_curriculum
from pretrain.config.schema import RunConfig
from pretrain.errors import ConfigError

_MOST_LISTED = 8


class RunLayout(NamedTuple):
    """Sizes of the axes, and what the steps of the run consume over all data ranks.

    `max_tokens`: the least of what max_tokens and max_epochs allow.
    """

    tensor: int
    pipeline: int
    data: int
    expert: int
    curriculum: Curriculum
    max_tokens: int | None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Sizes of the axes, as `Layout.grid` of a checkpoint."""
        return self.tensor, self.pipeline, self.data

    @property
    def total_steps(self) -> int:
        return self.curriculum.total_steps

    def continued(self, run: RunConfig, start: Position) -> RunLayout:
        """The same layout, with the steps that are left of a run that has come to `start`.

        Raises:
            ConfigError: a stage gets no step, or a size of the batch is not one of this layout.
        """
        curriculum = _plan(run, self.data, self.max_tokens, start)
        return self._replace(curriculum=curriculum)


def check_layout(run: RunConfig, world_size: int) -> RunLayout:
    """Lay `run` out over `world_size` processes.

    `data = world_size / (tensor * pipeline)`; how many steps it has is up to `plan_curriculum`.

    Raises:
        ConfigError: the layout does not divide the world, the model or a sequence, it has expert
            ranks and the model no experts, a sequence is longer than the model's positions, or a
            stage of the curriculum gets no step.
    """
    _check_model(run)
    _check_sequence(run)
    _check_world(run, world_size)
    _check_expert(run, world_size)
    return _layout(run, world_size)


def valid_tensor_sizes(run: RunConfig) -> list[int]:
    """Every tensor size that the model allows, ascending."""
    sizes = run.model.tensor_divisible()
    return [t for t in range(1, min(sizes.values()) + 1) if not any(n % t for n in sizes.values())]


def _check_model(run: RunConfig) -> None:
    tensor, pipeline = run.parallel.tensor, run.parallel.pipeline
    for name, size in run.model.tensor_divisible().items():
        if size % tensor:
            raise ConfigError(
                f"parallel.tensor={tensor} does not divide model.{name}={size}; "
                f"this model allows {_listed(valid_tensor_sizes(run))}"
            )
    if tensor > run.model.vocab_size:
        raise ConfigError(
            f"parallel.tensor={tensor} is larger than model.vocab_size={run.model.vocab_size}; "
            f"this model allows {_listed(valid_tensor_sizes(run))}"
        )
    if pipeline > run.model.num_layers:
        raise ConfigError(
            f"parallel.pipeline={pipeline} is more than model.num_layers={run.model.num_layers}, "
            f"so that a stage would be empty; set parallel.pipeline to {run.model.num_layers} "
            "or less"
        )


def _check_sequence(run: RunConfig) -> None:
    tensor = run.parallel.tensor
    lengths = {"data.sequence_length": run.data.sequence_length}
    for number, stage in enumerate(run.data.stages):
        if stage.sequence_length is not None:
            lengths[f"data.stages.{number}.sequence_length"] = stage.sequence_length
    for name, length in lengths.items():
        if run.parallel.sequence_parallel and length % tensor:
            below = length // tensor * tensor
            valid = [n for n in (below, below + tensor) if n > 0]
            raise ConfigError(
                f"{name}={length} is not a multiple of parallel.tensor={tensor}, as "
                f"parallel.sequence_parallel needs it; nearest lengths are {_listed(valid)}"
            )
    length = run.data.sequence_length
    if length > run.model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={length} is longer than "
            f"model.max_position_embeddings={run.model.max_position_embeddings}; "
            "shorten the sequences or raise max_position_embeddings"
        )


def _check_world(run: RunConfig, world_size: int) -> None:
    tensor, pipeline = run.parallel.tensor, run.parallel.pipeline
    model_size = tensor * pipeline
    if world_size % model_size == 0:
        return
    fitting = sorted(
        (abs(t * p - model_size), t, p)
        for t in valid_tensor_sizes(run)
        for p in range(1, run.model.num_layers + 1)
        if world_size % (t * p) == 0
    )
    raise ConfigError(
        f"parallel.tensor={tensor} x parallel.pipeline={pipeline} = {model_size} does not divide "
        f"the world size {world_size}; start a multiple of {model_size} processes, or choose "
        f"tensor x pipeline from {_listed([f'{t} x {p}' for _, t, p in fitting])}"
    )


def _check_expert(run: RunConfig, world_size: int) -> None:
    size, family = run.parallel.expert, run.model.family
    if size == 1:
        return
    num_experts = getattr(run.model, "num_experts", None)  # of a family that has experts
    if num_experts is None:
        raise ConfigError(
            f"parallel.expert={size}: the {family} family has no experts to share; "
            "set parallel.expert=1"
        )
    data = world_size // (run.parallel.tensor * run.parallel.pipeline)
    if num_experts % size or data % size:
        fitting = [n for n in range(1, data + 1) if num_experts % n == data % n == 0]
        raise ConfigError(
            f"parallel.expert={size} must divide model.num_experts={num_experts} and the {data} "
            "data ranks, which are the world size over parallel.tensor x parallel.pipeline; "
            f"set it to {_listed(fitting)}"
        )
    if run.training.optimizer == "muon":
        raise ConfigError(
            f"training.optimizer=muon with parallel.expert={size}: DeepSpeed's Muon knows no "
            "expert ranks; set parallel.expert=1 or training.optimizer=adamw"
        )


def _layout(run: RunConfig, world_size: int) -> RunLayout:
    training, parallel = run.training, run.parallel
    data = world_size // (parallel.tensor * parallel.pipeline)
    try:
        max_tokens = _max_tokens(run)
    except DataError as error:
        raise ConfigError(str(error)) from error
    curriculum = _plan(run, data, max_tokens, START)
    total = curriculum.total_steps
    ramps = training.warmup_steps + training.decay_steps
    if ramps >= total:
        raise ConfigError(
            f"the run has {total} steps, not more than training.warmup_steps + "
            f"training.decay_steps = {ramps}; shorten the ramps or train longer"
        )
    return RunLayout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        expert=parallel.expert,
        curriculum=curriculum,
        max_tokens=max_tokens,
    )


def _plan(run: RunConfig, data: int, max_tokens: int | None, start: Position) -> Curriculum:
    training = run.training
    per_round = training.batch_size * data
    full = per_round * training.gradient_accumulation_steps
    ramp = [BatchStep(each.until_tokens, each.sequences_per_step) for each in training.batch_ramp]
    for number, (until, size) in enumerate(ramp):
        if start.tokens < until:
            _check_size(f"training.batch_ramp.{number}.sequences_per_step", size, per_round, full)
    try:
        return plan_curriculum(
            run.data,
            sequences_per_step=full,
            max_steps=training.max_steps,
            max_tokens=max_tokens,
            ramp=ramp,
            start=start,
        )
    except DataError as error:
        raise ConfigError(str(error)) from error


def _check_size(name: str, size: int, per_round: int, full: int) -> None:
    """A step is made of whole micro-batches on every data rank, and a ramp ends below the rest."""
    if size % per_round:
        nearest = [
            n for n in (size // per_round * per_round, -(-size // per_round) * per_round) if n
        ]
        raise ConfigError(
            f"{name}={size} is not a multiple of {per_round}, which is training.batch_size x data "
            f"ranks; nearest are {_listed(nearest)}"
        )
    if size >= full:
        raise ConfigError(
            f"{name}={size} is not less than the full batch of {full}, which is "
            "training.batch_size x gradient_accumulation_steps x data ranks; raise "
            "gradient_accumulation_steps or shorten the ramp"
        )


def _max_tokens(run: RunConfig) -> int | None:
    """The least of what max_tokens and max_epochs allow; opens the data for the latter."""
    limits = [run.training.max_tokens]
    if run.training.max_epochs is not None:
        from data_tools.loading.builders import count_training_tokens

        tokens = count_training_tokens(run.data, vocab_size=run.model.vocab_size)
        limits.append(round(run.training.max_epochs * tokens))
    return min((limit for limit in limits if limit is not None), default=None)


def _listed(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:_MOST_LISTED])
    return shown + ", ..." if len(values) > _MOST_LISTED else shown
