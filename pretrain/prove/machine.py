"""Check that this machine holds a run that is proven as it is (`--full`), without torch."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from models.registry import get_family
from pretrain.errors import ConfigError
from pretrain.prove.small_run import STEPS, SmallRun

# Bytes of the truth for each parameter: the model, its gradient, and weights with two moments in
# the state before a step, in the optimizer and in both checkpoints; in fp64.
_TRUTH = 8 * (1 + 1 + 4 * 3)
_RANK = 20  # of a data rank: weights, gradient, master weights and two moments; no ZeRO
_CHECKPOINT = 16  # weights, master weights and two moments
_LEGS = 5
_GIB = 2**30


def check_fits(run: SmallRun, *, memory: int | None = None, disk: int | None = None) -> None:
    """Check memory and disk of this machine; both in bytes, and by default what is free.

    Activations are not counted: at the batch of a run file they are small beside the states.

    Raises:
        ConfigError: the run takes more.
    """
    number = get_family(run.config.model.family).num_parameters(run.config.model)
    folder = tempfile.gettempdir()
    have = {
        "memory": _free_memory() if memory is None else memory,
        f"disk space in {folder}": shutil.disk_usage(folder).free if disk is None else disk,
    }
    # The truth is computed when the ranks of a leg have ended.
    need = (number * max(_TRUTH, _RANK * run.data_size), number * _CHECKPOINT * STEPS * _LEGS)
    for (what, free), needed in zip(have.items(), need, strict=True):
        if needed > free:
            raise ConfigError(
                f"--full: {number:,} parameters take {needed / _GIB:,.1f} GiB of {what}, and "
                f"{free / _GIB:,.1f} GiB are free; leave --full out, and the run is made small"
            )


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
