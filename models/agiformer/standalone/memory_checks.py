"""Checks of the memories of a trained model, on what they are given by a text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.agiformer.block import HebbianMemory
from models.agiformer.memory.forms import MemoryInputs, naive_memory, normalized
from models.agiformer.standalone.model import AGIFORMER
from models.base import TokenInputs

PLASTICITIES = (0.1, 0.5, 0.99, 1.0)  # of the curriculum, and without decay by plasticity
FP32_BOUND, FP64_BOUND = 1e-5, 1e-9
_CHUNKS = (1, 3, 64, 1, 200)  # bytes, repeated, in which a text is streamed


class Check(NamedTuple):
    """`error` is relative to the largest value and passes up to `bound`."""

    check: str
    error: float
    bound: float
    passed: bool


@torch.no_grad()
def check_memories(model: AGIFORMER, tokens: Tensor) -> list[Check]:
    """The checks of every block for `tokens` int64 [1, s], and one of the whole model.

    In each block, at the plasticity of the model and at those of the curriculum, what the memory
    reads in fp32 is compared with the recurrence in fp64, patch after patch, and no decay may be
    above 1. A text that is streamed has to give the logits of the text at once, in fp64.

    Raises:
        ValueError: the model has no memory.
    """
    if not model.config.has_memory:
        raise ValueError("memory=none: this model has no memory to check; give one that has")
    checks: list[Check] = []
    for number, (memory, projections) in enumerate(_memories(model, tokens)):
        checks += _block_checks(f"block {number}", memory, projections)
    return [*checks, _stream_check(model, tokens)]


def _memories(model: AGIFORMER, tokens: Tensor) -> list[tuple[HebbianMemory, tuple[Tensor, ...]]]:
    """Every memory, a copy, with the projections that it was given."""
    found: list[tuple[HebbianMemory, tuple[Tensor, ...]]] = []

    def keep(memory: Any, arguments: tuple[Any, ...]) -> None:
        found.append((copy.deepcopy(memory), arguments[:4]))

    memories = [m for m in model.modules() if isinstance(m, HebbianMemory)]
    hooks = [memory.register_forward_pre_hook(keep) for memory in memories]
    try:
        model.body(TokenInputs(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _block_checks(
    name: str, memory: HebbianMemory, projections: tuple[Tensor, ...]
) -> Iterator[Check]:
    own = round(float(memory.plasticity), 6)
    for alpha in dict.fromkeys((own, *PLASTICITIES)):
        memory.set_plasticity(alpha)
        inputs = memory.inputs(*projections)
        found = normalized(memory.remember(inputs).values)
        double = MemoryInputs(*(x.double() for x in inputs[:4]))
        expected = normalized(naive_memory(double).values)
        label = f"{name}, plasticity {alpha:g}"
        yield _compared(f"{label}: reads what the recurrence reads", found, expected, FP32_BOUND)
        above = float(inputs.log_decay.max())
        yield Check(f"{label}: largest log decay", above, 0.0, above <= 0.0)


def _stream_check(model: AGIFORMER, tokens: Tensor) -> Check:
    body = copy.deepcopy(model.body).double().eval()
    cache, first = body.new_cache(1, tokens.shape[1]), 0
    parts: list[Tensor] = []
    while first < tokens.shape[1]:
        chunk = tokens[:, first : first + _CHUNKS[len(parts) % len(_CHUNKS)]]
        parts.append(body(TokenInputs(chunk), cache).logits)
        first += chunk.shape[1]
    whole = body(TokenInputs(tokens)).logits
    return _compared("a streamed text, all logits", torch.cat(parts), whole, FP64_BOUND)


def _compared(name: str, found: Tensor, expected: Tensor, bound: float) -> Check:
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    error = float((found.double() - expected).abs().max() / largest)
    return Check(name, error, bound, error <= bound)  # NaN does not pass
