"""Surroundings of lm_eval while it runs: random states, and progress bars."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from lm_eval.api import task as task_module
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from tqdm import tqdm


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """lm_eval draws a bar for each task, and has no setting against it."""
    drawn = task_module.tqdm
    if not shown:
        task_module.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        task_module.tqdm = drawn


@contextmanager
def seeded() -> Iterator[None]:
    """Seeds as `lm_eval.simple_evaluate` sets them; afterwards the states of before."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Seeds are set on every device, of which a process uses one.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
