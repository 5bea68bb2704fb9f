"""Uninitialised memory, such as the padding of a partition, is never read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
import pretrain.run
from pretrain.engine.partitions import clear_padding, local_shard
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import curve, final_weights, offloading, tiny_run, zero_file
from tests.tiers import tiered


def _run(config, ds_config_path: str, fill: bool) -> tuple[int, int]:
    """Train where `torch.empty` gives NaN, or not; the exit code, and how many numbers of padding
    this rank holds after the run, all of them 0."""
    warnings.simplefilter("ignore")  # it warns of what has no deterministic form
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    if fill:
        assert torch.empty(3).isnan().all()
    built = []
    build = pretrain.run.build_engine
    pretrain.run.build_engine = lambda *args, **kwargs: (
        built.append(build(*args, **kwargs)) or (built[0])
    )
    code = run_training(config, ds_config_path)
    padding = [
        parameter.ds_tensor.view(-1)[local_shard(parameter).elements.numel() :]
        for parameter in built[0].module.parameters()
        if hasattr(parameter, "ds_tensor")
    ]
    assert not any(numbers.any() for numbers in padding)
    return code, sum(numbers.numel() for numbers in padding)


def _stage(stage: int) -> dict[str, Any]:
    """The section of configs/ds with buckets that are filled with NaN in little time."""
    section = json.loads(Path(f"configs/ds/zero{stage}.json").read_text())["zero_optimization"]
    return {n: min(v, 200_000) if n.endswith("bucket_size") else v for n, v in section.items()}


BF16 = {"training__precision": "bf16"}
# Three data ranks divide few parameters, two tensor ranks not the vocabulary of 61.
DP3 = {"training__batch_size": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ZeRO-1 DP3": (3, _stage(1), DP3),
    "bf16 ZeRO-1 DP3": (3, _stage(1), DP3 | BF16),
    "ZeRO-2 DP3": (3, _stage(2), DP3),
    "bf16 ZeRO-2 DP3": (3, _stage(2), DP3 | BF16),
    "bf16 ZeRO-2 DP3 offload": (3, offloading(2), DP3 | BF16),
    "ZeRO-3 DP3": (3, _stage(3), DP3),
    "bf16 ZeRO-3 DP3": (3, _stage(3), DP3 | BF16),
    "bf16 ZeRO-3 DP3 offload": (3, offloading(3), DP3 | BF16),
    "bf16 TP2": (2, _stage(1), {"parallel__tensor": 2} | BF16),
    "bf16 PP2 offload": (2, offloading(1), {"parallel__pipeline": 2} | BF16),
    "mod, experts": (
        2,
        _stage(1),
        {"model": CASES["mod_experts"].config.model_dump(), "training__batch_size": 2},
    ),
    "daria_former TP2": (
        2, _stage(1), {"model": CASES["daria_former"].config.model_dump(), "parallel__tensor": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", tiered(LAYOUTS, ["bf16 ZeRO-3 DP3"]))
def test_a_run_in_memory_full_of_nan_is_the_same_run(layout, data, tmp_path):
    world_size, zero, changes = LAYOUTS[layout]
    settings = {"training__max_steps": 3, "watchdog__replica_interval": 1, **changes}
    curves, weights = [], []
    for fill in (False, True):
        config = tiny_run(data, run_dir=str(tmp_path / str(fill)), **settings)
        file = zero_file(zero, tmp_path)
        ends = run_ranks(_run, world_size, config, file, fill, init=False)
        assert [code for code, _ in ends] == [0] * world_size
        assert (sum(count for _, count in ends) > 0) == ("ZeRO-3" in layout)
        curves.append(curve(config))
        weights.append(final_weights(config))
    assert curves[0] == curves[1]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


class _Partitioned(torch.nn.Parameter):
    """A parameter as rank `rank` of `size` holds it under ZeRO-3."""

    @classmethod
    def of(cls, numel: int, *, rank: int, size: int) -> _Partitioned:
        parameter = cls(torch.empty(0))
        parameter.ds_tensor = torch.full((-(-numel // size),), float("nan"))
        parameter.ds_numel, parameter.ds_zero_partition_rank = numel, rank
        return parameter


@pytest.mark.parametrize(
    ("numel", "rank", "size", "start", "length"),
    [(8, 1, 2, 4, 4), (7, 1, 2, 4, 3), (7, 0, 2, 0, 4), (1, 2, 4, 1, 0), (5, 3, 4, 5, 0)],
)
def test_a_rank_holds_its_partition_without_the_padding(numel, rank, size, start, length):
    parameter = _Partitioned.of(numel, rank=rank, size=size)
    part = local_shard(parameter)
    assert (part.start, part.elements.numel()) == (start, length)
    clear_padding([parameter, torch.nn.Parameter(torch.full((2,), float("nan")))])
    assert parameter.ds_tensor[:length].isnan().all()
    assert not parameter.ds_tensor[length:].any()


def test_a_rank_holds_all_of_what_is_not_partitioned():
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    assert local_shard(parameter).start == 0
    assert torch.equal(local_shard(parameter).elements, torch.arange(6.0))
