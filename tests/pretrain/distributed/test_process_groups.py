"""The device of a rank."""

from __future__ import annotations

from pretrain.distributed.process_groups import device_index
from pretrain.errors import ConfigError
from tests.refusals import assert_refused


def test_every_rank_has_a_device_of_its_own():
    assert [device_index(rank, 4, in_task=False) for rank in range(4)] == [0, 1, 2, 3]
    assert device_index(3, 4, in_task=True) == 3
    assert device_index(3, 1, in_task=True) == 0, "Slurm shows a task its own one alone"
    for rank, devices, in_task in ((4, 4, False), (1, 1, False), (2, 2, True)):
        with assert_refused(
            "LOCAL_RANK",
            value=rank,
            constraint=f"{devices} CUDA",
            remedy="start",
            error=ConfigError,
        ):
            device_index(rank, devices, in_task=in_task)
