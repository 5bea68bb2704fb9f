"""Two tensor ranks that share one CUDA device over gloo, against one rank on the CPU.

NCCL refuses two ranks on one device, so this shows that sharded arithmetic is right on CUDA and
nothing about NCCL or speed. Ranks are spawned: a forked process cannot use CUDA.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.context import ParallelContext
from tests.distributed import free_port
from tests.equivalence import measure
from tests.gpu.device import DEVICE, SEED, context, tokens_of
from tests.models.families import CASES

TIMEOUT = 180.0  # seconds, for starting two interpreters and all cases


def _rank(rank: int, port: int, folder: str) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
        torch.cuda.init()  # init_device_mesh otherwise gives each rank a device of its own
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ctx = ParallelContext.from_world(tensor=2, device=DEVICE)
    for name, (family, config) in CASES.items():
        inputs, labels = tokens_of(name, DEVICE)
        loss, _, gradients = measure(family, config, inputs, labels, ctx, seed=SEED)
        on_cpu = {parameter: gradient.cpu() for parameter, gradient in gradients.items()}
        torch.save((loss.cpu(), on_cpu), Path(folder, f"{name}_{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (free_port(), str(folder))
    ranks = torch.multiprocessing.spawn(_rank, arguments, nprocs=2, join=False)
    try:
        assert ranks.join(timeout=TIMEOUT) or ranks.join(timeout=TIMEOUT), "a rank did not finish"
    finally:
        for process in ranks.processes:
            process.kill()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_tensor_ranks_on_one_device_equal_one_rank_on_the_cpu(name, results):
    family, config = CASES[name]
    cpu = torch.device("cpu")
    inputs, labels = tokens_of(name, cpu)
    expected = measure(family, config, inputs, labels, context(cpu), seed=SEED)
    for rank in range(2):
        loss, gradients = torch.load(results / f"{name}_{rank}.pt")
        torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)
        assert gradients.keys() == expected.gradients.keys()
        for parameter, gradient in expected.gradients.items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5)
