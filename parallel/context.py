"""The parallel layout of a run as seen from one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.precision import Precision


class Axis(NamedTuple):
    """One axis of the layout: its size, this process's rank on it, and its process group.

    `group` is None exactly when the axis was built without process groups (one process).
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class ParallelContext:
    """The layout as seen from one process; always passed explicitly, never global.

    Ranks are ordered with the tensor axis fastest, then data, then pipeline:
    `rank = (pipeline * data_size + data) * tensor_size + tensor`, the order of DeepSpeed's
    PipeModelDataParallelTopology and of Megatron-Core's parallel_state. The expert axis divides the
    data axis, neighbours first: `data = expert_data * expert_size + expert`. Ranks that differ in
    `expert` alone hold different experts of the same layers, those that differ in `expert_data`
    alone the same ones.
    """

    tensor: Axis = field(default_factory=Axis)
    pipeline: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    expert: Axis = field(default_factory=Axis)
    expert_data: Axis = field(default_factory=Axis)
    sequence_parallel: bool = False
    precision: Precision = field(default_factory=Precision)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.tensor.size == 1:
            raise ValueError(
                "sequence_parallel=True has no effect at tensor size 1; "
                "set parallel.sequence_parallel=false or parallel.tensor to 2 or more"
            )

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files that exist once per run."""
        return self.tensor.rank == self.pipeline.rank == self.data.rank == 0

    @classmethod
    def single(
        cls, *, precision: Precision | None = None, device: torch.device | str = "cpu"
    ) -> ParallelContext:
        """The context of a single process: size 1 on every axis, no process group."""
        return cls(precision=precision or Precision(), device=torch.device(device))

    @classmethod
    def from_world(
        cls,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        expert: int = 1,
        sequence_parallel: bool = False,
        precision: Precision | None = None,
        device: torch.device | str = "cpu",
    ) -> ParallelContext:
        """Arrange the ranks of the default process group as pipeline x data x tensor.

        The expert axis subdivides data. Collective: every rank calls it with the same sizes.

        Raises:
            ValueError: the sizes do not divide the world, or the expert size the data size.
        """
        world_size = dist.get_world_size()
        data = _data_size(world_size, tensor=tensor, pipeline=pipeline)
        _check_expert_size(expert, data)
        kind = torch.device(device).type
        axes = _axes(kind, {"pipeline": pipeline, "data": data, "tensor": tensor})
        if expert > 1:
            inside = {"expert_data": data // expert, "expert": expert}
            within = _axes(kind, {"pipeline": pipeline, **inside, "tensor": tensor})
            axes |= {name: within[name] for name in inside}
        else:
            axes["expert_data"] = axes["data"]
        if tensor > 1:
            from parallel.megatron import prepare_megatron

            prepare_megatron()
        return cls(
            **axes,
            sequence_parallel=sequence_parallel,
            precision=precision or Precision(),
            device=torch.device(device),
        )


def _axes(device_type: str, sizes: dict[str, int]) -> dict[str, Axis]:
    """Create one axis per entry of `sizes`, the last one varying fastest (collective)."""
    names = tuple(sizes)
    mesh = dist.init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=names)
    return {
        name: Axis(mesh[name].size(), mesh.get_local_rank(name), mesh.get_group(name))
        for name in names
    }


def _check_expert_size(expert: int, data: int) -> None:
    if expert < 1 or data % expert:
        raise ValueError(
            f"parallel.expert={expert} does not divide the data size {data}, which is the world "
            "size over parallel.tensor x parallel.pipeline; choose an expert size that does"
        )


def _data_size(world_size: int, *, tensor: int, pipeline: int) -> int:
    model_size = tensor * pipeline
    if model_size < 1 or world_size % model_size:
        raise ValueError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} = {model_size} does not "
            f"divide the world size {world_size}; start a multiple of {model_size} processes"
        )
    return world_size // model_size
