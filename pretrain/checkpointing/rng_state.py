"""RNG states of a rank as one safetensors file."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from parallel.checkpoint.errors import RESTORE, CheckpointError
from parallel.checkpoint.tensor_file import TensorFile


def rng_states() -> dict[str, Tensor]:
    """Copies of the states of Python's, NumPy's and torch's global generators."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator is the point
    assert isinstance(numpy_state, dict)
    mersenne = numpy_state["state"]
    states = {
        "python.words": torch.tensor([version, *words], dtype=torch.int64),
        # The pending second value of a Gaussian pair; NaN stands for none.
        "python.gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy.words": torch.from_numpy(mersenne["key"].astype(np.int64)),
        "numpy.position": torch.tensor(
            [mersenne["pos"], numpy_state["has_gauss"]], dtype=torch.int64
        ),
        "numpy.gauss": torch.tensor(numpy_state["gauss"], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["torch.cuda"] = torch.cuda.get_rng_state()
    return states


def write_rng_state(file: BinaryIO, states: Mapping[str, Tensor]) -> None:
    file.write(save(dict(states)))


def restore_rng_state(path: Path) -> None:
    """Set the generators to the states in `path`.

    Raises:
        CheckpointError: unreadable, or not the states of the generators that this process has.
    """
    expected = set(rng_states())
    try:
        with TensorFile(path) as file:
            states = {name: file.read(name).clone() for name in file.names()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); {RESTORE}") from error
    if set(states) != expected:
        difference = ", ".join(sorted(set(states) ^ expected))
        raise CheckpointError(
            f"{str(path)!r} is not of the generators of this process, difference: {difference}; "
            "resume on the kind of device that wrote it"
        )
    _restore(states)


def seed_rng(*, seed: int, step: int, rank: int) -> None:
    """Seed the generators as a function of the arguments.

    For a rank of another layout, which has no predecessor to take the states from. Models draw
    from seeds, names and the text, so neither losses nor weights depend on these generators.
    """
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3, np.uint32)
    python, numpy, torch_seed = (int(word) for word in words)
    random.seed(python)
    np.random.seed(numpy)  # noqa: NPY002 - the global generator is the point
    torch.manual_seed(torch_seed)


def _restore(states: Mapping[str, Tensor]) -> None:
    version, *words = states["python.words"].tolist()
    gauss = states["python.gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    position, has_gauss = states["numpy.position"].tolist()
    np.random.set_state(  # noqa: NPY002 - the global generator is the point
        {
            "bit_generator": "MT19937",
            "state": {"key": states["numpy.words"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": states["numpy.gauss"].item(),
        }
    )
    torch.set_rng_state(states["torch.cpu"])
    if "torch.cuda" in states:
        torch.cuda.set_rng_state(states["torch.cuda"])
