"""Per-parameter view of the master weights and moments in DeepSpeed's optimizers.

The only code that reads DeepSpeed's optimizers (0.19.8). Under ZeRO they step a few flat vectors,
partitioned over data ranks; here they appear as flat ranges of named parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.carry import canonical_names
from parallel.sharding import Sharding, local_shape, sharding_of
from pretrain.checkpointing.optimizer_shards import MASTER, MOMENTS
from pretrain.engine.partitions import local_shard


class ParamSlice(NamedTuple):
    """A parameter as named in checkpoints, or one expert of a stack.

    `shape`: of this tensor rank's slice, unpartitioned over data ranks. `first`: its offset in the
    flattened parameter.
    """

    name: str
    shape: tuple[int, ...]
    sharding: Sharding
    first: int = 0


def param_slices(name: str, parameter: Tensor, *, expert_rank: int) -> list[ParamSlice]:
    """The parameter itself, or each of its stacked experts under its global number."""
    sharding, shape = sharding_of(name, parameter), local_shape(parameter)  # type: ignore[arg-type]
    if sharding.experts is None:
        return [ParamSlice(name, shape, sharding)]
    num_local, *matrix = shape
    dim = None if sharding.dim is None else sharding.dim - 1
    return [
        ParamSlice(
            f"{name}.{expert_rank * num_local + index}",
            tuple(matrix),
            Sharding(dim, sharding.full_size),
            index * math.prod(matrix),
        )
        for index in range(num_local)
    ]


class ShardLocation(NamedTuple):
    """Location of the elements of a parameter that this rank's optimizer updates.

    They begin at `start` of this tensor rank's flattened slice. `master` (fp32) and `weight` (what
    forward reads) are views of them. They lie at `offset` of `flat`, the tensor that the optimizer
    steps. `copies`: number of data ranks that hold the same elements.
    """

    start: int
    master: Tensor
    weight: Tensor
    flat: Tensor
    offset: int
    copies: int = 1


class Fragment(NamedTuple):
    """Consecutive elements of one parameter slice, under its name in checkpoints.

    `shape`: of this tensor rank's slice, unpartitioned over data ranks. `is_tied_copy`: an earlier
    pipeline stage owns the parameter.
    """

    name: str
    shape: tuple[int, ...]
    sharding: Sharding
    is_tied_copy: bool
    location: ShardLocation

    @property
    def length(self) -> int:
        return self.location.master.numel()


class OptimizerView:
    """The AdamW state of one rank of a DeepSpeed engine, at any ZeRO stage.

    Args:
        engine: its module has `specs`, the layers that declare tied parameters.
        data_size: data ranks of the run.
        expert_rank: selects the stacked experts that this rank holds.
    """

    def __init__(self, engine: Any, *, data_size: int, expert_rank: int = 0) -> None:
        self._wrapper = engine.optimizer
        self._optimizer: Any = getattr(self._wrapper, "optimizer", self._wrapper)
        self._parameters = trained_parameters(engine.module)
        self.slices = {
            name: param_slices(name, parameter, expert_rank=expert_rank)
            for name, parameter in self._parameters.items()
        }
        self.fragments = list(self._fragments(data_size))

    def step(self, fragment: Fragment) -> int:
        """Step count of these elements; 0 before the first step."""
        return int(self._optimizer.state.get(fragment.location.flat, {}).get("step", 0))

    def value(self, fragment: Fragment, key: str) -> Tensor:
        """Master weights or a moment, as a view; zeros before the first step."""
        location = fragment.location
        state = self._optimizer.state.get(location.flat)
        if key == MASTER:
            return location.master
        if not state:
            return torch.zeros_like(location.master)
        return state[key].view(-1).narrow(0, location.offset, fragment.length)

    def init_state(self, flat: Tensor, step: int) -> None:
        """Create the state of a tensor after `step` steps, with zero moments to be filled."""
        # torch keeps the step count in a tensor, DeepSpeed's optimizers in an int.
        counts_in_tensor = isinstance(self._optimizer, torch.optim.AdamW)
        count = torch.tensor(float(step), device=flat.device) if counts_in_tensor else step
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        self._optimizer.state[flat] = {"step": count, **moments}

    def _fragments(self, data_size: int) -> Iterator[Fragment]:
        for name, parameter in self._parameters.items():
            location = self._locate(parameter, data_size)
            if location is not None:
                is_tied_copy = getattr(parameter, "ds_pipe_replicated", False)
                yield from _cut(self.slices[name], location, is_tied_copy=is_tied_copy)

    def _locate(self, parameter: Any, data_size: int) -> ShardLocation | None:
        """Locate this rank's elements; None if other data ranks hold all of the parameter."""
        if _is_stage_3(self._wrapper):
            return _locate_stage_3(self._wrapper, parameter)
        elements = parameter.detach().view(-1)
        if self._wrapper is self._optimizer:
            return ShardLocation(0, elements, elements, parameter, 0, copies=data_size)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        master = flat.detach().narrow(0, offset, length)
        return ShardLocation(start, master, elements.narrow(0, start, length), flat, offset)


def _locate_stage_3(zero: Any, parameter: Any) -> ShardLocation | None:
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    start, weight = local_shard(parameter)
    if weight.numel() == 0:
        return None
    flat = zero.fp32_partitioned_groups_flat[group]
    return ShardLocation(
        start, flat.detach().narrow(0, offset, weight.numel()), weight, flat, offset
    )


def _cut(
    slices: list[ParamSlice], location: ShardLocation, *, is_tied_copy: bool
) -> Iterator[Fragment]:
    """Split the elements of a parameter into fragments of its slices."""
    for each in slices:
        low = max(location.start, each.first)
        length = (
            min(location.start + len(location.master), each.first + math.prod(each.shape)) - low
        )
        if length > 0:
            own = ShardLocation(
                low - each.first,
                location.master.narrow(0, low - location.start, length),
                location.weight.narrow(0, low - location.start, length),
                location.flat,
                location.offset + low - location.start,
                location.copies,
            )
            yield Fragment(each.name, each.shape, each.sharding, is_tied_copy, own)


def publish_weights(engine: Any) -> None:
    """Broadcast what each data rank has written to its fragments (collective)."""
    zero = engine.optimizer
    if _is_stage_3(zero):
        # Releases gathered parameters; the next forward gathers what it needs. The matching
        # epilogue would gather small parameters at once, and a backward then finds some of them
        # empty (DeepSpeed 0.19.8).
        zero.checkpoint_event_prologue()
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def _is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "grad_position") and hasattr(optimizer, "fp16_groups")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters of this stage, by their names in checkpoints."""
    names = canonical_names(module.specs)  # type: ignore[arg-type]
    return {names.get(n, n): p for n, p in module.named_parameters() if p.requires_grad}
