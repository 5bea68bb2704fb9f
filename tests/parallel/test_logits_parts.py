"""Losses of logits that are computed in parts against those of the whole logits, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from parallel.context import ParallelContext
from parallel.cross_entropy import (
    cross_entropy_and_entropy,
    set_logits_parts,
    vocab_logits,
    vocab_parallel_cross_entropy,
    vocab_parallel_z_losses,
)
from parallel.layers import VocabParallelHead
from tests.distributed import run_ranks
from tests.tolerance import FP64

SEQ, BATCH, HIDDEN, VOCAB = 24, 3, 5, 43  # two ranks pad the vocabulary


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Weight [V, h], input of the head [s, b, h], labels [b, s]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    x = torch.randn(SEQ, BATCH, HIDDEN, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels[1, 2:11] = -100
    return weight, x, labels


def _total(logits: object, labels: Tensor, ctx: ParallelContext) -> Tensor:
    """Every loss of this module, with another weight for every token."""
    weights = torch.arange(SEQ * BATCH, dtype=torch.float64).view(SEQ, BATCH) - 8
    losses, entropies = cross_entropy_and_entropy(logits, labels, ctx=ctx)
    losses = losses + 2 * vocab_parallel_cross_entropy(logits, labels, ctx=ctx)
    losses = losses + vocab_parallel_z_losses(logits, labels, ctx=ctx)
    return (weights * losses).sum() + (weights * entropies).square().sum()


def _head(weight: Tensor, ctx: ParallelContext, parts: int) -> nn.Module:
    head = nn.Module()
    head.output = VocabParallelHead(VOCAB, HIDDEN, ctx=ctx).double()
    rows = head.output.weight.shape[0]
    own = weight[ctx.tensor.rank * rows :][:rows]
    with torch.no_grad():
        head.output.weight.zero_()[: len(own)] = own
    set_logits_parts(head, parts)
    return head


def _measured(parts: int, tensor: int = 1, sequence_parallel: bool = False) -> list[Tensor]:
    """The total, and the gradients of this rank's rows of the weight and of its inputs."""
    ctx = ParallelContext.single()
    if tensor > 1:
        ctx = ParallelContext.from_world(tensor=tensor, sequence_parallel=sequence_parallel)
    weight, x, labels = _inputs()
    head = _head(weight, ctx, parts)
    if sequence_parallel:
        x = x.chunk(tensor)[ctx.tensor.rank]
    x = x.clone().requires_grad_()
    total = _total(vocab_logits(head.output, x), labels, ctx)
    total.backward()
    return [total.detach(), head.output.weight.grad, x.grad]


@pytest.mark.parametrize("parts", [2, 3, 24])
def test_losses_of_parts_have_the_values_and_gradients_of_the_whole(parts):
    for found, expected in zip(_measured(parts), _measured(1), strict=True):
        torch.testing.assert_close(found, expected, **FP64)


@pytest.mark.parametrize(
    "last",
    [
        [nn.Tanh()],
        [nn.LogSoftmax(dim=-1)],
        [nn.Tanh(), nn.Unflatten(-1, (1, VOCAB)), nn.Flatten(-2)],
    ],
)
def test_logits_that_an_operation_needs_for_its_own_gradient_are_not_overwritten(last):
    """The recomputed ones, of which autograd does not notice it."""
    weight, x, labels = _inputs()
    found = []
    for parts in (1, 4):
        head = _head(weight, ParallelContext.single(), parts)
        head.output = nn.Sequential(head.output, *last)
        set_logits_parts(head, parts)
        x = x.detach().requires_grad_()
        _total(vocab_logits(head.output, x), labels, ParallelContext.single()).backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], **FP64)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_that_share_the_vocabulary_compute_parts_of_the_whole(sequence_parallel):
    total, weight, x = _measured(1)
    results = run_ranks(_measured, 2, 4, 2, sequence_parallel)
    rows = torch.cat([found[1] for found in results])[:VOCAB]
    inputs = torch.cat([found[2] for found in results]) if sequence_parallel else results[1][2]
    for found in results:
        torch.testing.assert_close(found[0], total, **FP64)
    torch.testing.assert_close(rows, weight, **FP64)
    torch.testing.assert_close(inputs, x, **FP64)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(x)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("parts", [1, 4])
def test_nothing_is_larger_than_the_logits_of_one_part(parts):
    with _Largest() as largest:
        _measured(parts)
    assert largest.elements == SEQ // parts * BATCH * VOCAB


def test_without_gradients_logits_are_whole():
    weight, x, _ = _inputs()
    head = _head(weight, ParallelContext.single(), parts=4)
    with torch.no_grad():
        torch.testing.assert_close(vocab_logits(head.output, x), x @ weight.T, **FP64)
