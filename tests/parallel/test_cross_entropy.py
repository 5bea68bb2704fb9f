from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from parallel import cross_entropy
from parallel.context import ParallelContext
from parallel.cross_entropy import (
    cross_entropy_and_entropy,
    logits_used_once,
    vocab_parallel_cross_entropy,
    vocab_parallel_entropy,
    vocab_parallel_z_losses,
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


def _loss(logits: torch.Tensor, labels: torch.Tensor, with_entropy: bool) -> torch.Tensor:
    if not with_entropy:
        return vocab_parallel_cross_entropy(logits, labels, ctx=CTX).square().sum()
    losses, entropies = cross_entropy_and_entropy(logits, labels, ctx=CTX)
    return losses.square().sum() + entropies.var()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [200, 1 << 20])
def test_the_gradient_of_logits_that_are_used_once_takes_their_place(
    chunk_size, dtype, with_entropy, monkeypatch
):
    monkeypatch.setitem(cross_entropy._CHUNK_SIZE, "cpu", chunk_size)
    weights, labels = _inputs(dtype)
    gradients, kept = [], []
    for used_once in (False, True):
        logits = weights * 1
        values = logits.detach().clone()
        logits.register_hook(gradients.append)
        with logits_used_once(used_once):
            loss = _loss(logits, labels, with_entropy)
        loss.backward(retain_graph=True)
        kept.append(torch.equal(logits, values))
        if used_once:
            assert gradients[-1].data_ptr() == logits.data_ptr()
            with pytest.raises(RuntimeError, match="inplace"):
                loss.backward()
    assert torch.equal(*gradients)
    assert kept == [True, False]


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


def _both_in_fp64(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, entropies, and the logits that autograd differentiates."""
    x = logits.detach().double().requires_grad_()
    log_p = x.log_softmax(dim=-1)
    scored = labels.T != -100
    own = -log_p.gather(-1, labels.T.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
    return own.masked_fill(~scored, 0.0), -(log_p.exp() * finite).sum(dim=-1), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True], ids=["all columns", "columns of -inf"])
@pytest.mark.parametrize("chunk_size", [1, 200, 1 << 20])
def test_cross_entropy_and_entropy_equal_the_equations_alone_and_together(
    chunk_size, masked, dtype, monkeypatch
):
    monkeypatch.setitem(cross_entropy._CHUNK_SIZE, "cpu", chunk_size)
    logits, labels = _inputs(dtype)
    if masked:
        logits = logits.detach().clone()
        logits[..., 43:] = -torch.inf
        logits.requires_grad_()
        labels = labels.clamp(max=42)
    of_losses, of_entropies = torch.randn(7, 3), torch.randn(7, 3)
    losses, entropies, x = _both_in_fp64(logits, labels)
    (expected,) = torch.autograd.grad(
        (losses * of_losses).sum() + (entropies * of_entropies).sum(), x
    )
    together = cross_entropy_and_entropy(logits, labels, ctx=CTX)
    alone = (
        vocab_parallel_cross_entropy(logits, labels, ctx=CTX),
        vocab_parallel_entropy(logits, ctx=CTX),
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for found in (together, alone):
        assert found[0].dtype == found[1].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].double(), entropies, rtol=1e-5, atol=1e-5)
        total = (found[0] * of_losses).sum() + (found[1] * of_entropies).sum()
        (gradient,) = torch.autograd.grad(total, logits)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_entropy_of_certain_and_of_even_predictions():
    certain = torch.tensor([[[1e4, 0.0, -1e4]], [[0.0, 0.0, 0.0]]], requires_grad=True)
    for entropies in (
        vocab_parallel_entropy(certain, ctx=CTX),
        cross_entropy_and_entropy(certain, torch.zeros(1, 2, dtype=torch.int64), ctx=CTX)[1],
    ):
        torch.testing.assert_close(entropies, torch.tensor([[0.0], [math.log(3)]]))
        (gradient,) = torch.autograd.grad(entropies.sum(), certain)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-6)


def _shared_vocabulary(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two ranks with 25 columns and 25, of which the last 7 only pad."""
    ctx = ParallelContext.from_world(tensor=2)
    logits, labels = _inputs(dtype)
    logits = logits.detach().clone()
    logits[..., 43:] = -torch.inf
    own = logits.chunk(2, dim=-1)[ctx.tensor.rank].contiguous().requires_grad_()
    before = own.detach().clone()
    losses, entropies = cross_entropy_and_entropy(own, labels.clamp(max=42), ctx=ctx)
    (losses.square().sum() + entropies.square().sum()).backward()
    assert torch.equal(own, before)
    return losses.detach(), entropies.detach(), own.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_that_share_the_vocabulary_get_the_values_and_gradients_of_the_whole(dtype):
    logits, labels = _inputs(dtype)
    logits = logits.detach().clone()
    logits[..., 43:] = -torch.inf
    losses, entropies, x = _both_in_fp64(logits, labels.clamp(max=42))
    (losses.square().sum() + entropies.square().sum()).backward()
    results = run_ranks(_shared_vocabulary, 2, dtype)
    for found in results:
        torch.testing.assert_close(found[0].double(), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].double(), entropies, rtol=1e-5, atol=1e-5)
    gradient = torch.cat([found[2] for found in results], dim=-1)
    assert gradient.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
    torch.testing.assert_close(gradient.double(), x.grad, rtol=tolerance, atol=tolerance)


def _masked_logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [7, 3, 50] whose last 14 columns are padding: all that the last of 4 ranks has."""
    logits, labels = _inputs(torch.float64)
    logits = logits.detach().clone()
    logits[..., 36:] = -torch.inf
    return logits.to(dtype), labels.clamp(max=35)


def _z_losses_by_the_equation(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(log sum exp x)^2` of scored tokens in fp64, and the gradient of its weighted sum."""
    x = logits.double().requires_grad_()
    losses = x.exp().sum(dim=-1).log() ** 2 * (labels.T != -100)
    (losses * _weights()).sum().backward()
    return losses.detach(), x.grad


def _weights() -> torch.Tensor:
    return torch.arange(21, dtype=torch.float64).view(7, 3) - 8


TOLERANCES = {torch.float64: 1e-12, torch.float32: 32 * 2**-23, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("chunk_size", [1, 200, 1 << 20])
def test_z_losses_and_their_gradients_equal_the_equation(chunk_size, dtype, monkeypatch):
    monkeypatch.setitem(cross_entropy._CHUNK_SIZE, "cpu", chunk_size)
    logits, labels = _masked_logits(dtype)
    expected, expected_gradient = _z_losses_by_the_equation(logits, labels)
    before = logits.clone()
    losses = vocab_parallel_z_losses(logits.requires_grad_(), labels, ctx=CTX)
    (losses * _weights()).sum().backward()
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.detach(), before)
    assert (losses[labels.T == -100] == 0).all()
    assert (logits.grad[labels.T == -100] == 0).all()
    exact = min(TOLERANCES[dtype], TOLERANCES[torch.float32])  # losses are never in bf16
    torch.testing.assert_close(losses.double(), expected, rtol=exact, atol=exact)
    rtol = TOLERANCES[dtype]
    torch.testing.assert_close(logits.grad.double(), expected_gradient, rtol=rtol, atol=rtol)


def test_z_losses_of_very_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    losses = vocab_parallel_z_losses(logits, torch.tensor([[1]]), ctx=CTX)
    losses.sum().backward()
    assert losses.item() == 1e8
    assert logits.grad.tolist() == [[[2e4, 0.0, 0.0]]]


def _shared_z_losses(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    ctx = ParallelContext.from_world(tensor=4)
    logits, labels = _masked_logits(dtype)
    padded = torch.nn.functional.pad(logits, (0, 2), value=-torch.inf)
    own = padded.chunk(4, dim=-1)[ctx.tensor.rank].contiguous().requires_grad_()
    losses = vocab_parallel_z_losses(own, labels, ctx=ctx)
    (losses * _weights()).sum().backward()
    return losses.detach(), own.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_z_losses_of_ranks_that_share_the_vocabulary_equal_those_of_the_whole(dtype):
    expected, expected_gradient = _z_losses_by_the_equation(*_masked_logits(dtype))
    results = run_ranks(_shared_z_losses, 4, dtype)
    tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    for losses, _ in results:
        torch.testing.assert_close(losses.double(), expected, **tolerance)
    gradient = torch.cat([own for _, own in results], dim=-1)[..., :50]
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)
