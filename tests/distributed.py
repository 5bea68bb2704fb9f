"""Run a function on N processes over gloo, quickly.

The parent has already imported torch (and what the test module imports), so ranks are forked
instead of started: a test costs tenths of a second, not the seconds that imports take.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.prove.ranks import Ended, Forks, free_port, start_ranks

__all__ = ["free_port", "run_ranks"]


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    init: bool = True,
    patience: float = 5.0,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` forked ranks and return their results in order.

    Each rank sees RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and an initialised
    gloo process group unless `init=False`. Results travel back pickled. Once a rank has failed the
    others have `patience` seconds to end.

    Raises:
        AssertionError: a rank raised, died or did not finish in `timeout` seconds; the message
            holds the log of every rank.
    """
    for_runs = "pretrain.engine.engine" in sys.modules  # else nothing of DeepSpeed is needed
    with (
        tempfile.TemporaryDirectory() as folder,
        Forks(patience=patience, for_runs=for_runs) as forks,
    ):
        results = [Path(folder) / f"{rank}.result" for rank in range(world_size)]

        def main() -> int:
            rank = int(os.environ["RANK"])
            if init:
                dist.init_process_group("gloo", rank=rank, world_size=world_size)
            results[rank].write_bytes(pickle.dumps(fn(*args, **kwargs)))
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            return 0

        pids = start_ranks(forks, main, size=world_size, logs=Path(folder))
        ends = forks.wait(pids, timeout=timeout)
        if any(end.code != 0 for end in ends):
            raise AssertionError(_report(ends, timeout))
        return [pickle.loads(result.read_bytes()) for result in results]


def _report(ends: Sequence[Ended], timeout: float) -> str:
    lines = []
    for rank, end in enumerate(ends):
        verdict = (
            f"not finished (limit {timeout:.0f} s)" if end.code is None else f"exit {end.code}"
        )
        log = end.log.read_text()[-3000:] if end.log.exists() else ""
        lines.append(f"--- rank {rank}: {verdict}\n{log}")
    return "\n".join(lines)
