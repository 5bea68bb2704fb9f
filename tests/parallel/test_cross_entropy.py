from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallel import cross_entropy
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_parallel_cross_entropy

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
