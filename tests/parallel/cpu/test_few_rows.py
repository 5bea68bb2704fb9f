from __future__ import annotations

import pytest
import torch
from torch import nn

from models.base import TokenInputs, logits_of
from parallel.context import ParallelContext
from parallel.cpu import few_rows
from parallel.cpu.few_rows import MAX_ROWS, few_rows_product, is_few_rows_product
from parallel.layers import ColumnParallelLinear, VocabParallelHead, apply_linear, project_together
from tests.models.checkpoints import model
from tests.models.families import CASES, evaluated

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="a batch is a loop of products without MKL"
)
TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(5))
ORDINARY = ("agiformer", "amrpa", "daria_former", "dart", "dtf", "llama", "mod")


@pytest.fixture
def any_weight(monkeypatch):
    """Small weights take the path of large ones, on any number of threads."""
    monkeypatch.setattr(few_rows, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, MAX_ROWS])
@pytest.mark.parametrize(("outputs", "bias"), [(64, False), (75, True), (9, True)])
def test_the_product_is_that_of_a_linear_layer_within_its_rounding(num_rows, outputs, bias):
    x, weight = _draw(num_rows, 1, 40), _draw(outputs, 40)
    added = _draw(outputs) if bias else None
    y = few_rows_product(x, weight, added)
    exact = nn.functional.linear(
        x.double(), weight.double(), None if added is None else added.double()
    )
    magnitudes = nn.functional.linear(x.abs().double(), weight.abs().double())
    if added is not None:
        magnitudes += added.abs()
    # 40 products and sums, in any order, each off by half an eps of what it adds up at most.
    bound = 41 * torch.finfo(torch.float32).eps / 2 * magnitudes * (1 + 1e-5)
    assert y.shape == (num_rows, 1, outputs)
    assert ((y - exact).abs() <= bound).all()


def _weight(**options) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1024, 1024, **options))


@torch.no_grad()
def test_few_rows_with_a_large_weight_are_recognised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weight = _weight()
    for shape in ((1024,), (1, 1, 1024), (4, 8, 1024)):
        assert is_few_rows_product(torch.zeros(shape), weight)
    assert not is_few_rows_product(torch.zeros(33, 1024), weight)
    assert not is_few_rows_product(torch.zeros(0, 1024), weight)
    assert not is_few_rows_product(torch.zeros(2, 512), nn.Parameter(torch.zeros(1000, 512)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not is_few_rows_product(torch.zeros(1, 1024), weight)
    assert is_few_rows_product(torch.zeros(2, 1024), weight)


class _Subclass(torch.Tensor):
    pass


@torch.no_grad()
def test_other_dtypes_devices_and_kinds_of_tensors_are_left_to_torch():
    x = torch.zeros(2, 1024)
    assert is_few_rows_product(x, _weight())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_few_rows_product(x, _weight())
    assert not is_few_rows_product(x.bfloat16(), _weight(dtype=torch.bfloat16))
    assert not is_few_rows_product(x, _weight(dtype=torch.float64))
    assert not is_few_rows_product(x.to("meta"), _weight(device="meta"))
    assert not is_few_rows_product(x, nn.Parameter(_weight().T))
    assert not is_few_rows_product(x, _weight().data.as_subclass(_Subclass))
    assert not is_few_rows_product(x.as_subclass(_Subclass), _weight())
    assert not is_few_rows_product(x, _weight().data)


class _Called(Exception):
    pass


def _raise(*arguments) -> None:
    raise _Called


def test_calls_with_gradient_have_the_ordinary_product(any_weight, monkeypatch):
    monkeypatch.setattr("parallel.layers.few_rows_product", _raise)
    layer = nn.Linear(32, 64)
    assert apply_linear(layer, _draw(2, 1, 32)).requires_grad
    with torch.no_grad(), pytest.raises(_Called):
        apply_linear(layer, _draw(2, 1, 32))


@pytest.mark.parametrize("change", ["hook", "pre_hook", "forward", "subclass"])
@torch.no_grad()
def test_what_wraps_a_layer_takes_effect(any_weight, change):
    layer = nn.Linear(32, 64, bias=False)
    match change:
        case "hook":
            layer.register_forward_hook(_raise)
        case "pre_hook":
            layer.register_forward_pre_hook(_raise)
        case "forward":
            layer.forward = _raise  # as accelerate does
        case "subclass":
            layer = type("Adapted", (nn.Linear,), {"forward": _raise})(32, 64)
    with pytest.raises(_Called):
        apply_linear(layer, _draw(2, 1, 32))


@torch.no_grad()
def test_exported_and_compiled_programs_have_the_ordinary_product(any_weight):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return apply_linear(self.linear, x)

    program = torch.export.export(Layer(), (_draw(2, 1, 32),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default"]
    traced = torch.jit.trace(Layer(), _draw(2, 1, 32))
    assert traced(_draw(50, 1, 32)).shape == (50, 1, 64)
    assert "aten::linear" in str(traced.inlined_graph)


@torch.no_grad()
def test_a_weight_that_a_hook_of_the_layer_gathers_is_not_asked_for_its_shape(any_weight):
    layer = nn.Linear(32, 64, bias=False)
    whole, layer.weight.data = layer.weight.data, torch.empty(0)

    def gather(module: nn.Module, inputs: object) -> None:
        module.weight.data = whole

    layer.register_forward_pre_hook(gather)
    x = _draw(2, 1, 32)
    assert torch.equal(apply_linear(layer, x), torch.nn.functional.linear(x, whole))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_sparse_weight_of_a_pruned_model_has_its_own_product(any_weight):
    layer, x = nn.Linear(32, 64), _draw(2, 1, 32)
    expected = layer(x)
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr())
    torch.testing.assert_close(apply_linear(layer, x), expected)


@torch.no_grad()
def test_projections_of_one_input_and_the_head_are_the_same(any_weight):
    ctx = ParallelContext.single()
    layers = [ColumnParallelLinear(32, n, ctx=ctx, bias=n == 48) for n in (48, 64)]
    layers.append(VocabParallelHead(61, 32, ctx=ctx))
    for layer in layers:
        for i, parameter in enumerate(layer.double().parameters()):
            parameter.copy_(_draw(*parameter.shape, i + 1)[..., 0])
    x = _draw(2, 1, 32).double()
    for joined in (False, True):
        for y, layer in zip(project_together(x, *layers, joined=joined), layers, strict=True):
            torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ORDINARY)
@torch.no_grad()
def test_every_family_decodes_as_with_ordinary_products(kind, monkeypatch):
    family, config = CASES[kind]
    whole = evaluated(model(config, family).train(), TOKENS).double()
    products = []

    def counted(*arguments):
        products.append(arguments)
        return few_rows_product(*arguments)

    def decoded() -> torch.Tensor:
        cache = whole.new_cache(len(TOKENS), TOKENS.shape[1])
        parts = TOKENS.split([3, *[1] * (TOKENS.shape[1] - 3)], dim=1)
        return torch.cat([logits_of(whole(TokenInputs(part), cache)) for part in parts])

    expected = decoded()
    assert not products
    monkeypatch.setattr("parallel.layers.few_rows_product", counted)
    monkeypatch.setattr(few_rows, "LEAST_WEIGHT", 1)
    torch.testing.assert_close(decoded(), expected, rtol=1e-9, atol=1e-9)
    assert len(products) > TOKENS.shape[1] * config.num_layers
