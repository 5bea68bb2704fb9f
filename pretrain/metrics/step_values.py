"""The numbers of a step, read from the device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pretrain.engine.engine import StepResult
from pretrain.errors import TrainingError


class Values(NamedTuple):
    """A StepResult as Python numbers; reading them synchronises with the device."""

    loss: float
    terms: dict[str, float]
    grad_norm: float


def read_values(result: StepResult, step: int) -> Values:
    """The numbers of a step, read from the device at once.

    Raises:
        TrainingError: the loss or the norm is not finite.
    """
    tensors = [result.loss, *result.terms.values()]
    numbers = torch.stack([x.detach().float().view(()) for x in tensors]).tolist()
    values = Values(
        numbers[0],
        dict(zip(result.terms, numbers[1:], strict=True)),
        float(result.grad_norm),
    )
    if not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
        raise TrainingError(
            f"step {step}: loss {values.loss}, gradient norm {values.grad_norm}; nothing was saved "
            "since the last checkpoint; lower training.lr or look at the data of this step"
        )
    return values
