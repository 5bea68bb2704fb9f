from __future__ import annotations

import torch

from models.common.init import residual_output
from models.common.mlp import SwiGLU
from parallel.context import ParallelContext
from parallel.sharding import Normal


def test_swiglu_equals_the_equation_and_its_gradients():
    mlp = SwiGLU(16, 40, ctx=ParallelContext.single(), init=Normal(0.02), output_init=Normal(0.02))
    for parameter in mlp.parameters():
        parameter.data.normal_()
    x = torch.randn(5, 2, 16, requires_grad=True)
    y = mlp(x)
    upstream = torch.randn_like(y)
    inputs = (x, mlp.gate.weight, mlp.up.weight, mlp.down.weight)
    gradients = torch.autograd.grad(y, inputs, upstream)

    x64, gate, up, down = (t.detach().double().requires_grad_() for t in inputs)
    gated = x64 @ gate.T
    expected = (gated / (1 + (-gated).exp()) * (x64 @ up.T)) @ down.T
    theirs = torch.autograd.grad(expected, (x64, gate, up, down), upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for mine, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-3)


def test_projections_into_the_residual_stream_start_smaller_in_deeper_models():
    assert residual_output(0.02, num_layers=2) == Normal(0.01)
    assert residual_output(0.02, num_layers=50) == Normal(0.002)
