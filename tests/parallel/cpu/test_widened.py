"""Products of bf16 in fp32: within their rounding, in every family and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.common import attention
from parallel import layers as parallel_layers
from parallel.context import ParallelContext
from parallel.cpu import widened
from parallel.cpu.widened import MAX_NARROW_ROWS, is_widened, widened_product
from parallel.layers import ColumnParallelLinear, product, project_together
from tests.distributed import run_ranks
from tests.equivalence import measure
from tests.models.families import CASES

FAMILIES = ("agiformer", "amrpa", "daria_former", "dart", "dtf", "llama", "mod", "mod_experts")
BF16, FP32 = (torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float32))


@pytest.fixture(autouse=True)
def no_units(monkeypatch):
    """A processor without units for bf16."""
    monkeypatch.setattr(widened, "_HAS_NO_UNITS", True)


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.mT
    return y if bias is None else y + bias


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "bias"),
    [
        ((5, 2, 24), (12, 24), True),
        ((70, 24), (12, 24), False),
        ((24,), (12, 24), True),
        ((0, 2, 24), (12, 24), True),
        ((3, 7, 24), (3, 12, 24), False),
    ],
)
def test_result_and_gradients_are_sums_in_fp32_rounded_once(x_shape, weight_shape, bias):
    x, weight = _draw(*x_shape), _draw(*weight_shape)
    operands = [x, weight, *([_draw(12)] if bias else [])]
    y = product(*operands)
    upstream = _draw(*y.shape).detach()
    results = [y, *torch.autograd.grad(y, operands, upstream)]

    def of(function):
        exact = [function(each.detach().double()).requires_grad_() for each in operands]
        z = _exact(*exact, *([] if bias else [None]))
        return [z, *torch.autograd.grad(z, exact, function(upstream.double()))]

    num_terms = 1 + max(24, x.numel() // 24, 12)
    for result, exact, magnitude in zip(results, of(lambda a: a), of(torch.abs), strict=True):
        assert result.dtype == torch.bfloat16
        assert result.shape == exact.shape
        bound = BF16 * exact.abs() + 1.01 * num_terms * FP32 * magnitude
        assert ((result.double() - exact).abs() <= bound).all()


def test_transforms_of_functions_and_second_derivatives_are_those_of_the_product():
    x, weight = _draw(3, 40, 24).detach(), _draw(12, 24)

    def energy(x: Tensor, weight: Tensor) -> Tensor:
        return product(x, weight).square().sum()

    direct = torch.stack([torch.autograd.grad(energy(row, weight), weight)[0] for row in x])
    each = torch.func.vmap(torch.func.grad(energy, argnums=1), in_dims=(0, None))(x, weight)
    torch.testing.assert_close(each, direct, rtol=2**-6, atol=2**-6 * direct.abs().max().item())
    first = torch.autograd.grad(energy(x, weight), weight, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), weight)[0]
    exact = 2 * x.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    expected = exact.sum(dim=0).expand(12, -1)
    bound = 2**-5 * exact.abs().sum(dim=0).expand(12, -1)
    assert ((second.double() - expected).abs() <= bound).all()


def test_gradients_that_nobody_needs_are_not_computed():
    x, weight = _draw(40, 24).detach(), _draw(12, 24)
    widened_product(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    x, weight = _draw(40, 24), _draw(12, 24).detach()
    widened_product(x, weight).sum().backward()
    assert x.grad is not None


class _Subclass(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_other_dtypes_devices_and_kinds_of_tensors_are_left_to_torch(monkeypatch):
    x = _draw(MAX_NARROW_ROWS, 24).detach()
    assert is_widened(x, row_size=24)
    assert is_widened(x, nn.Parameter(x), row_size=24)
    with torch.no_grad():
        assert not is_widened(x, row_size=24)
        assert is_widened(x, row_size=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_widened(x, row_size=24)
    for other in (x.float(), x.half(), x.to("meta"), x.as_subclass(_Subclass), x.to_sparse_csr()):
        assert not is_widened(other, row_size=24)
        assert not is_widened(x, other, row_size=24)
    monkeypatch.setattr(widened, "_HAS_NO_UNITS", False)
    assert not is_widened(x, row_size=24)


@pytest.mark.parametrize("joined", [False, True])
def test_projections_and_attention_compile_to_one_graph(joined):
    torch._dynamo.reset()
    ctx = ParallelContext.single()
    layers = [ColumnParallelLinear(16, 32, ctx=ctx, bias=not joined).bfloat16() for _ in range(3)]
    for parameter in (each for layer in layers for each in layer.parameters()):
        nn.init.normal_(parameter)

    def mix(x: Tensor) -> Tensor:
        q, k, v = project_together(x, *layers, joined=joined)
        heads = [attention.split_heads(each, 16) for each in (q, k, v)]
        return attention.causal_attention(*heads)

    x = _draw(40, 2, 16)
    upstream = _draw(2, 2, 40, 16).detach()
    leaves = [x, *(layer.weight for layer in layers)]
    eager = torch.autograd.grad(mix(x), leaves, upstream)
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)(x)
    for ours, expected in zip(torch.autograd.grad(compiled, leaves, upstream), eager, strict=True):
        assert torch.equal(ours, expected)


def test_an_exported_program_has_the_products_of_any_processor():
    layer = nn.Linear(16, 8).bfloat16()

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return product(x, layer.weight.detach())

    program = torch.export.export(Module(), (_draw(40, 16).detach(),))
    dtypes = {node.meta["val"].dtype for node in program.graph.nodes if "val" in node.meta}
    assert dtypes == {torch.bfloat16}


def _distance(kind: str, ctx: ParallelContext) -> list[float]:
    """From fp64 to loss and gradients in bf16: with the products of torch, and widened."""
    family, config = CASES[kind]
    stream = torch.randint(
        0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(3)
    )
    inputs, labels = TokenInputs(stream[:, :-1].contiguous()), stream[:, 1:].contiguous()
    calls = []

    def measured(dtype: torch.dtype) -> list[Tensor]:
        result = measure(family, config, inputs, labels, ctx, seed=1, noise=0.1, dtype=dtype)
        return [result.loss, *(result.gradients[name] for name in sorted(result.gradients))]

    def counted(*operands: Tensor, row_size: int) -> bool:
        calls.append(is_widened(*operands, row_size=row_size))
        return calls[-1]

    found = []
    exact = [each.double() for each in measured(torch.float64)]
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, parallel_layers):
            patch.setattr(module, "is_widened", counted)
        for widens in (False, True):
            patch.setattr(widened, "_HAS_NO_UNITS", widens)
            calls.clear()
            results = measured(torch.bfloat16)
            assert any(calls) is widens
            errors = [
                (a.double() - b).norm() / (b.norm() + 1e-3)
                for a, b in zip(results, exact, strict=True)
            ]
            found.append(torch.stack(errors).square().mean().sqrt().item())
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_every_gradient_are_as_near_to_fp64_as_by_torchs_products(kind):
    by_torch, ours = _distance(kind, ParallelContext.single())
    assert 0.0 < ours < 1.25 * by_torch


def _distance_of_ranks(kind: str, sequence_parallel: bool) -> list[float]:
    ctx = ParallelContext.from_world(tensor=2, sequence_parallel=sequence_parallel)
    return _distance(kind, ctx)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_so_are_those_of_tensor_ranks(sequence_parallel):
    for by_torch, ours in run_ranks(_distance_of_ranks, 2, "llama", sequence_parallel):
        assert 0.0 < ours < 1.25 * by_torch
