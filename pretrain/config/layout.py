"""Parallel layout of a run: sizes of the axes, checked against processes and model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from pretrain.config.errors import listed
from pretrain.config.run_length import check_length
from pretrain.config.schema import RunConfig
from pretrain.errors import ConfigError


class RunLayout(NamedTuple):
    """Sizes of the parallel axes."""

    tensor: int
    pipeline: int
    data: int
    expert: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Sizes of the axes, as `Layout.grid` of a checkpoint."""
        return self.tensor, self.pipeline, self.data


def check_layout(config: RunConfig, world_size: int) -> RunLayout:
    """Lay `config` out over `world_size` processes, without opening the data.

    `data = world_size / (tensor * pipeline)`.

    Raises:
        ConfigError: the layout does not divide the world size, the model or a sequence; it has
            expert ranks and the model no experts; a sequence is longer than the model's positions;
            or the steps cannot be planned (see `plan_run`).
    """
    _check_model(config)
    _check_sequence(config)
    _check_world(config, world_size)
    _check_expert(config, world_size)
    parallel = config.parallel
    data = world_size // (parallel.tensor * parallel.pipeline)
    check_length(config, data_size=data)
    return RunLayout(parallel.tensor, parallel.pipeline, data, parallel.expert)


def valid_tensor_sizes(config: RunConfig) -> list[int]:
    """Every tensor size that the model allows, ascending."""
    sizes = config.model.tensor_divisible()
    return [t for t in range(1, min(sizes.values()) + 1) if not any(n % t for n in sizes.values())]


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` below `wanted`, and the smallest above if there is one."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    above = [n for n in divisors if n > wanted][:1]
    return [n for n in divisors if n < wanted][-1:] + above


def _check_model(config: RunConfig) -> None:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for name, size in config.model.tensor_divisible().items():
        if size % tensor:
            raise ConfigError(
                f"parallel.tensor={tensor} does not divide model.{name}={size}; "
                f"this model allows {listed(valid_tensor_sizes(config))}"
            )
    if tensor > config.model.vocab_size:
        raise ConfigError(
            f"parallel.tensor={tensor} is larger than model.vocab_size={config.model.vocab_size}; "
            f"this model allows {listed(valid_tensor_sizes(config))}"
        )
    if pipeline > (num_layers := config.model.num_layers):
        raise ConfigError(
            f"parallel.pipeline={pipeline} is more than model.num_layers={num_layers}, so that a "
            f"stage would be empty; set parallel.pipeline to {num_layers} or less"
        )


def _check_sequence(config: RunConfig) -> None:
    lengths = {"data.sequence_length": config.data.sequence_length}
    for number, stage in enumerate(config.data.stages):
        if stage.sequence_length is not None:
            lengths[f"data.stages.{number}.sequence_length"] = stage.sequence_length
    unit: int = getattr(config.model, "sequence_unit", 1)  # of a family that takes some at once
    factors = {f"the model's unit of {unit} tokens": unit} if unit > 1 else {}
    if config.parallel.sequence_parallel:
        tensor = config.parallel.tensor
        factors[f"parallel.tensor={tensor}, as parallel.sequence_parallel needs it"] = tensor
    divisor = math.prod(factors.values())
    for name, length in lengths.items():
        if length % divisor:
            below = length // divisor * divisor
            valid = [n for n in (below, below + divisor) if n > 0]
            raise ConfigError(
                f"{name}={length} is not a multiple of {' x '.join(factors)}; nearest lengths are "
                f"{listed(valid)}"
            )
    _check_logits_parts(config, lengths)
    length = config.data.sequence_length
    if length > config.model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={length} is longer than "
            f"model.max_position_embeddings={config.model.max_position_embeddings}; "
            "shorten the sequences or raise max_position_embeddings"
        )


def _check_logits_parts(config: RunConfig, lengths: Mapping[str, int]) -> None:
    parts = config.training.logits_parts
    ranks = config.parallel.tensor if config.parallel.sequence_parallel else 1
    common = math.gcd(*(length // ranks for length in lengths.values()))
    for name, length in lengths.items():
        local = length // ranks
        if local % parts:
            whose = f"{name}={length}" + (f" over {ranks} ranks: {local}" if ranks > 1 else "")
            raise ConfigError(
                f"training.logits_parts={parts} does not divide the sequence, {whose}; nearest "
                f"parts of every length are {listed(_nearest_divisors(common, parts))}"
            )


def _check_world(config: RunConfig, world_size: int) -> None:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    model_size = tensor * pipeline
    if world_size % model_size == 0:
        return
    fitting = sorted(
        (abs(t * p - model_size), t, p)
        for t in valid_tensor_sizes(config)
        for p in range(1, config.model.num_layers + 1)
        if world_size % (t * p) == 0
    )
    raise ConfigError(
        f"parallel.tensor={tensor} x parallel.pipeline={pipeline} = {model_size} does not divide "
        f"the world size {world_size}; start a multiple of {model_size} processes, or choose "
        f"tensor x pipeline from {listed([f'{t} x {p}' for _, t, p in fitting])}"
    )


def _check_expert(config: RunConfig, world_size: int) -> None:
    size, family = config.parallel.expert, config.model.family
    if size == 1:
        return
    num_experts = getattr(config.model, "num_experts", None)  # of a family that has experts
    if num_experts is None:
        raise ConfigError(
            f"parallel.expert={size}: the {family} family has no experts to share; "
            "set parallel.expert=1"
        )
    data = world_size // (config.parallel.tensor * config.parallel.pipeline)
    if num_experts % size or data % size:
        fitting = [n for n in range(1, data + 1) if num_experts % n == data % n == 0]
        raise ConfigError(
            f"parallel.expert={size} must divide model.num_experts={num_experts} and the {data} "
            "data ranks, which are the world size over parallel.tensor x parallel.pipeline; "
            f"set it to {listed(fitting)}"
        )
    if config.training.optimizer == "muon":
        raise ConfigError(
            f"training.optimizer=muon with parallel.expert={size}: DeepSpeed's Muon knows no "
            "expert ranks; set parallel.expert=1 or training.optimizer=adamw"
        )
