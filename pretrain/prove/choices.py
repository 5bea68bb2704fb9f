"""Choices of a run (tokens, experts, ends of loops), recorded and given to the truth.

Where two scores are within rounding of each other, two runs may choose otherwise, and all that
follows differs. So the truth takes the choices of the program as given, and a check of their own
says how far its scores must be off to explain them: by rounding, or the choices are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from parallel.decisions import ErrorFor, observed_decisions
from pretrain.errors import EXIT_COMPLETED

Choice = list[Tensor]  # the integers and booleans of one decision


class Choices(NamedTuple):
    """One decision of a step in parts: `parts[t][i]` is what tensor rank t chose for the i-th
    micro-batch of the step, in the order of its samples."""

    parts: list[list[Choice]]


class Given(NamedTuple):
    """A decision that the truth was given: the layer, in how many places its own is another, and
    the error of its scores that explains this, relative to `scale`, their root mean square."""

    layer: str
    number: int
    error: float
    scale: float = 1.0


def recorded(main: Callable[[], int], path: Path) -> int:
    """Run `main`, and write the decisions that this process has made in training to `path`."""
    made: list[Choice] = []

    def record(decision: Any, error_for: ErrorFor) -> Any:
        choice = [leaf.clone() for leaf in _discrete(decision)[0]]
        if not any(leaf.is_meta for leaf in choice):  # a run first checks the shapes of its model
            made.append(choice)
        return decision

    with observed_decisions(record):
        code = main()
    if code == EXIT_COMPLETED:
        torch.save(made, path)
    return code


def read_choices(
    files: Sequence[Path], *, tensor: int, pipeline: int, micro_batches: Sequence[int]
) -> list[list[Choices]]:
    """The decisions of every step that a leg has trained, in the order of the model's layers.

    `files`: of all ranks. `micro_batches`: of each data rank, by step. Empty if no layer decides.

    Raises:
        ValueError: a rank has not decided equally often in every micro-batch.
    """
    by_rank = [torch.load(file, weights_only=True) for file in files]
    data = len(files) // (tensor * pipeline)
    total = sum(micro_batches)
    for rank, made in enumerate(by_rank):
        if len(made) % total:
            raise ValueError(
                f"rank {rank} made {len(made)} choices in {total} micro-batches; as many in each "
                "were expected"
            )
    steps: list[list[Choices]] = []
    begin = 0
    for count in micro_batches:
        of_step = []
        for stage in range(pipeline):
            ranks = [
                [by_rank[(stage * data + d) * tensor + t] for d in range(data)]
                for t in range(tensor)
            ]
            each = len(ranks[0][0]) // total  # decisions of the stage in a micro-batch
            of_step += [
                Choices([
                    [of_rank[(begin + m) * each + n] for m in range(count) for of_rank in of_tensor]
                    for of_tensor in ranks
                ])
                for n in range(each)
            ]  # fmt: skip
        steps.append(of_step)
        begin += count
    return steps


class Giver:
    """Observer of the truth: puts the program's decisions of a step in the place of its own."""

    def __init__(self, choices: Sequence[Choices]) -> None:
        self._choices = list(choices)
        self.layer = ""  # that computes now
        self.given: list[Given] = []

    def __call__(self, decision: Any, error_for: ErrorFor) -> Any:
        number = len(self.given)
        if number >= len(self._choices):
            self.given.append(Given(self.layer, 0, math.inf))
            return decision
        own, put_back = _discrete(decision)
        try:
            theirs = [_whole(self._choices[number], i, leaf) for i, leaf in enumerate(own)]
        except ValueError:
            self.given.append(Given(self.layer, 0, math.inf))
            return decision
        other = put_back(theirs)
        differing = max(int((a != b).sum()) for a, b in zip(own, theirs, strict=True))
        error, scale = (float(each) for each in error_for(other))
        error = error / scale if error else 0.0  # NaN stays
        self.given.append(Given(self.layer, differing, error, scale))
        return other

    def finish(self) -> list[Given]:
        """All that was given; a decision of the program that the truth never asked for is wrong."""
        surplus = len(self._choices) - len(self.given)
        return self.given + [Given("no layer", 0, math.inf)] * surplus


def _discrete(decision: Any) -> tuple[Choice, Callable[[Choice], Any]]:
    """Integer and boolean tensors of a decision, and a function that puts others in their place."""
    leaves, structure = tree_flatten(decision)
    places = [
        i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not x.is_floating_point()
    ]

    def put_back(others: Choice) -> Any:
        replaced = list(leaves)
        for place, other in zip(places, others, strict=True):
            replaced[place] = other
        return tree_unflatten(replaced, structure)

    return [leaves[i] for i in places], put_back


def _whole(choices: Choices, leaf: int, own: Tensor) -> Tensor:
    """A tensor of the whole step, of the shape of `own`: [s, b, ...] or [b, s].

    Rows are joined along the last dimension in which a part is smaller. What is smaller in the
    first dimension, too, is each tensor rank's share of the sequence, whose end is padding where
    they do not divide it; otherwise all tensor ranks have chosen the same.

    Raises:
        ValueError: the parts do not make up that shape, or tensor ranks have chosen otherwise.
    """
    ranks = [[choice[leaf] for choice in of_rank] for of_rank in choices.parts]
    part = ranks[0][0]
    if part.dim() != own.dim():
        raise ValueError(f"a choice of shape {list(part.shape)} for one of {list(own.shape)}")
    smaller = [d for d in range(own.dim()) if part.shape[d] < own.shape[d]]
    rows = [torch.cat(parts, (smaller or [0])[-1]) if parts[1:] else parts[0] for parts in ranks]
    if rows[0].shape != own.shape:
        whole = torch.cat(rows, 0)
        if own.shape[0] < whole.shape[0] < own.shape[0] + len(rows):
            whole = whole[: own.shape[0]]
    elif all(torch.equal(each, rows[0]) for each in rows):
        whole = rows[0]
    else:
        raise ValueError("tensor ranks have chosen otherwise")
    if whole.shape != own.shape or whole.dtype != own.dtype:
        raise ValueError(f"choices of shape {list(whole.shape)} for one of {list(own.shape)}")
    return whole
