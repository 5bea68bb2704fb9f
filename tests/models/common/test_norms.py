from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from models.common.norms import RMSNorm, _RMSNorm, rms_norm
from parallel.context import ParallelContext


def _norm(eps: float, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(64, eps=eps, ctx=ParallelContext.single())
    norm.weight.data.uniform_(0.5, 2.0)
    return norm.to(dtype)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_values_and_gradients_equal_the_equation_in_fp64(eps):
    norm = _norm(eps, torch.float32)
    x = torch.randn(5, 3, 64, requires_grad=True)
    upstream = torch.randn(5, 3, 64)
    y = norm(x)
    y.backward(upstream)

    x64 = x.detach().double().requires_grad_()
    weight64 = norm.weight.detach().double().requires_grad_()
    expected = weight64 * x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt()
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.weight.grad.double(), weight64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_equal_those_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = _norm(1e-5, dtype)
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(norm.weight)
    x = (100 * torch.randn(5, 3, 64)).to(dtype)
    # In bf16 they round before multiplying by the weight; one unit in the last place.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(norm(x), theirs(x), rtol=tolerance, atol=0.0)


def test_bf16_input_is_squared_and_summed_in_fp32():
    norm = _norm(1e-5, torch.bfloat16)
    norm.weight.data.fill_(1.0)
    x = torch.full((1, 1, 64), 1.0, dtype=torch.bfloat16)
    x[..., 0] = 30.0
    expected = x.float() / x.float().square().mean(-1, keepdim=True).add(1e-5).sqrt()
    assert torch.equal(norm(x), expected.bfloat16())


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8), (2, 3, 4, 8)])
def test_the_gradients_of_its_own_pass_the_numerical_check(shape):
    x = torch.randn(*shape, 2, dtype=torch.float64)[..., 0].requires_grad_()  # strided
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-3), (x, weight))
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(_RMSNorm.apply(x, weight, 1e-3), expected)


def test_a_norm_without_weight_is_one_with_ones():
    x = torch.randn(4, 3, 8)
    torch.testing.assert_close(rms_norm(x, None, eps=1e-5), rms_norm(x, torch.ones(8), eps=1e-5))


def test_zeros_have_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), eps=1e-6).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))
