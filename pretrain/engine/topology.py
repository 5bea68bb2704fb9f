"""The axes of a run under the names by which DeepSpeed's plain engine asks for them."""

from __future__ import annotations

import torch.distributed as dist

from parallel.context import ParallelContext


class DeepSpeedTopology:
    """The `mpu` of DeepSpeed: tensor and data axis of a run without pipeline.

    DeepSpeed (0.19.8) calls the tensor axis "model parallel" in some places and "tensor model
    parallel" in others, and looks for further axes with `hasattr`.
    """

    def __init__(self, ctx: ParallelContext) -> None:
        self._tensor, self._data = ctx.tensor, ctx.data

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
