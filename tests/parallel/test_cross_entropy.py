from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallel import cross_entropy
from parallel.context import ParallelContext
from parallel.cross_entropy import (
    cross_entropy_and_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_entropy,
)
from tests.distributed import run_ranks

CTX = ParallelContext.single()


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = (5 * torch.randn(7, 3, 50)).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (3, 7))
    labels[1, 2:4] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 200, 1 << 20])
def test_losses_and_gradients_equal_those_of_torch_at_every_chunk_size(
    chunk_size, dtype, monkeypatch
):
    monkeypatch.setitem(cross_entropy._CHUNK_SIZE, "cpu", chunk_size)
    logits, labels = _inputs(dtype)
    losses = vocab_parallel_cross_entropy(logits, labels, ctx=CTX)
    upstream = torch.randn(7, 3)
    (gradient,) = torch.autograd.grad(losses, logits, upstream)

    expected = F.cross_entropy(
        logits.float().permute(1, 2, 0), labels, reduction="none", ignore_index=-100
    ).T
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream)
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-6)


def test_positions_that_are_not_scored_have_loss_and_gradient_zero():
    logits, labels = _inputs(torch.float32)
    losses = vocab_parallel_cross_entropy(logits, labels, ctx=CTX)
    losses.sum().backward()
    ignored = labels.T == -100
    assert (losses[ignored] == 0).all()
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).all()


def test_the_logits_are_left_as_they_are():
    logits, labels = _inputs(torch.float32)
    before = logits.detach().clone()
    vocab_parallel_cross_entropy(logits, labels, ctx=CTX).sum().backward()
    assert torch.equal(logits, before)


def test_very_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    losses = vocab_parallel_cross_entropy(logits, torch.tensor([[1]]), ctx=CTX)
    losses.sum().backward()
    assert losses.item() == 1e4
    assert logits.grad.tolist() == [[[1.0, -1.0, 0.0]]]


def test_a_label_beyond_the_vocabulary_is_an_error():
    logits, labels = _inputs(torch.float32)
    labels[0, 0] = 50
    with pytest.raises(RuntimeError, match="out of bounds"):
        vocab_parallel_cross_entropy(logits, labels, ctx=CTX)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)


@pytest.mark.parametrize("chunk_size", [1, 200, 1 << 20])
def test_entropies_and_losses_together_equal_their_equations(chunk_size, monkeypatch):
    monkeypatch.setitem(cross_entropy._CHUNK_SIZE, "cpu", chunk_size)
    logits, labels = _inputs(torch.float32)
    exact = logits.detach().double().requires_grad_()
    upstream = torch.randn(2, 7, 3)
    losses, entropies = cross_entropy_and_entropy(logits, labels, ctx=CTX)
    wide = F.cross_entropy(exact.permute(1, 2, 0), labels, reduction="none", ignore_index=-100).T
    torch.testing.assert_close(losses.double(), wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), _entropy(exact), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vocab_parallel_entropy(logits, ctx=CTX), entropies)
    (found,) = torch.autograd.grad((losses * upstream[0] + entropies * upstream[1]).sum(), logits)
    total = (wide * upstream[0] + _entropy(exact) * upstream[1]).sum()
    (expected,) = torch.autograd.grad(total, exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    alone = vocab_parallel_entropy(logits, ctx=CTX)
    (found,) = torch.autograd.grad((alone * upstream[1]).sum(), logits)
    (expected,) = torch.autograd.grad((_entropy(exact) * upstream[1]).sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def _rank_entropy() -> tuple[torch.Tensor, torch.Tensor]:
    ctx = ParallelContext.from_world(tensor=2)
    logits, _ = _inputs(torch.float32)
    padded = F.pad(logits.detach(), (0, 2), value=-torch.inf)  # columns that pad the vocabulary
    own = padded.chunk(2, dim=-1)[ctx.tensor.rank].contiguous().requires_grad_()
    entropies = vocab_parallel_entropy(own, ctx=ctx)
    entropies.square().sum().backward()
    return entropies.detach(), own.grad


def test_ranks_that_share_a_vocabulary_find_its_entropy():
    logits, _ = _inputs(torch.float32)
    expected = _entropy(logits)
    expected.square().sum().backward()
    results = run_ranks(_rank_entropy, 2)
    for entropies, _ in results:
        torch.testing.assert_close(entropies, expected.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([own for _, own in results], dim=-1)
    torch.testing.assert_close(gradient[..., :50], logits.grad, rtol=1e-4, atol=1e-5)
    assert (gradient[..., 50:] == 0).all()
