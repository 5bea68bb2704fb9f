"""The Hebbian memory: all forms compute the definition, in any precision, at any length."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.agiformer.block import HebbianMemory
from models.agiformer.memory.forms import (
    MIN_LOG_DECAY,
    MemoryInputs,
    chunked_memory,
    naive_memory,
    normalized,
    positive_features,
    recurrent_memory,
    with_normalizer,
)
from models.agiformer.model import FAMILY
from models.base import TokenInputs
from parallel.context import ParallelContext
from parallel.sharding import role_of
from tests.models.agiformer.cases import config_of, model_of, text_of
from tests.tolerance import FP64


def _inputs(
    length: int,
    *,
    alpha: float = 0.9,
    starts: bool = False,
    dtype: torch.dtype = torch.float64,
    size: int = 6,
) -> MemoryInputs:
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, 3, length, size, generator=generator, dtype=torch.float64)
    decay = torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    log_decay = (alpha * (4.0 + decay).sigmoid()).log()
    begins = None
    if starts:
        begins = torch.rand(2, length, generator=generator) < 0.2
    leaves = [x.to(torch.bfloat16).to(dtype) for x in (q, k, v, log_decay)]
    return MemoryInputs(*leaves, begins)


def _read(form, inputs: MemoryInputs, state=None, **options):
    """What a form reads, its state, and the gradient of a function of both."""
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    q, k, v, log_decay = leaves
    made = MemoryInputs(
        positive_features(q), positive_features(k), with_normalizer(v), log_decay, inputs.starts
    )
    values, after = form(made, state, **options)
    out = normalized(values)
    weights = torch.linspace(-1, 1, out.shape[2], dtype=out.dtype).unsqueeze(-1)
    gradients = torch.autograd.grad((out * weights).sum() + after.sin().sum(), leaves)
    return out, after, *gradients


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (13, 4), (13, 1), (13, 64)])
def test_chunks_equal_the_definition_in_outputs_state_and_gradients(length, chunk, starts):
    inputs = _inputs(length, starts=starts)
    state = torch.randn(2, 3, 6, 7, dtype=torch.float64).abs()
    for given in (None, state):
        expected = _read(naive_memory, inputs, given)
        for found, wanted in zip(
            _read(chunked_memory, inputs, given, chunk=chunk), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted, **FP64)


def test_steps_and_chunks_of_any_sizes_continue_each_other():
    inputs, state, parts = _inputs(23), None, []
    whole = naive_memory(inputs)
    bounds = list(itertools.accumulate([5, 1, 1, 9, 1, 6], initial=0))
    for first, last in itertools.pairwise(bounds):
        own = MemoryInputs(*(x[:, :, first:last] for x in inputs[:4]))
        if last - first == 1:
            values, state = recurrent_memory(own, state)
        else:
            values, state = chunked_memory(own, state, chunk=4)
        parts.append(values)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole.values, **FP64)
    torch.testing.assert_close(state, whole.state, **FP64)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("length", [37, 124, 256, 4096])
def test_fp32_chunks_keep_the_recurrence_at_low_plasticity_and_great_length(alpha, length):
    """exp(+sum) forms overflow here from patch 37 on at alpha 0.1. Bound: the products of 64 decays
    and sums of positive terms, each with the rounding of a few operations."""
    found = _read(chunked_memory, _inputs(length, alpha=alpha, dtype=torch.float32), chunk=64)
    expected = _read(chunked_memory, _inputs(length, alpha=alpha), chunk=1)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).abs().max() <= 1e-5 * other.abs().max()


def test_decays_after_forgotten_patches_keep_their_precision():
    """Logs sum to -1000 where 50 patches are forgotten; differences of such sums in fp32 are off by
    up to 6e-5. One patch is written afterwards, so that what is read is one product of decays."""
    inputs = _inputs(64, dtype=torch.float32)
    inputs.log_decay[:] = -torch.rand(64, generator=torch.Generator().manual_seed(0))
    inputs.log_decay[:, :, :50] = MIN_LOG_DECAY
    one = torch.zeros(2, 3, 64, 6)
    one[:, :, 50] = 1.0
    made = inputs._replace(q=torch.ones_like(one), k=one, v=with_normalizer(one))
    found = chunked_memory(made, chunk=64).values[:, :, 50:]
    double = MemoryInputs(*(x.double() for x in made[:4]))
    expected = naive_memory(double).values[:, :, 50:]
    # The rounding of a sum below 8, of exp and of two products.
    torch.testing.assert_close(found.double(), expected, rtol=12 * 2.0**-23, atol=0.0)


def test_no_exponent_is_positive(monkeypatch):
    seen = []
    plain = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda x: (seen.append(x.max()), plain(x))[1])
    chunked_memory(_inputs(70, alpha=0.1, starts=True), chunk=16)
    recurrent_memory(_inputs(1, alpha=0.1), torch.zeros(2, 3, 6, 6))
    assert len(seen) > 4
    assert max(seen) <= 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_memory_is_fp32_under_autocast_and_returns_the_dtype_it_was_given(dtype):
    memory, u = _memory().float(), torch.randn(40, 2, 32)
    with torch.autocast("cpu", dtype=dtype):
        projected = [projection(u) for projection in memory.projections]
        assert {x.dtype for x in projected} == {dtype}
        out = memory(*projected)
        inputs = memory.inputs(*projected)
        values, state = memory.remember(inputs)
    assert out.dtype == dtype
    assert {x.dtype for x in (*inputs[:4], values, state)} == {torch.float32}
    # Nothing between the projections and the result was rounded to half precision.
    outside, state_outside = memory.remember(memory.inputs(*projected))
    assert torch.equal(state, state_outside)
    assert torch.equal(out, normalized(outside).to(dtype).permute(2, 0, 1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_strong_projections_stay_finite_over_4096_patches_at_plasticity_one_tenth(dtype, sign):
    memory = _memory(plasticity=0.1).float()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (sign * 30 * torch.rand(3, 4096, 1, 32, generator=generator)).to(dtype)
    decay = 40 * torch.randn(4096, 1, 4, generator=generator).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v, decay)]
    out = memory(*leaves)
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.float().square().sum(), leaves):
        assert gradient.isfinite().all()


def test_features_of_negative_projections_do_not_cancel():
    x = torch.tensor([-15.0, -1.0, 0.0, 2.0])
    expected = torch.nn.functional.elu(x.double()) + 1
    torch.testing.assert_close(positive_features(x).double(), expected, rtol=1e-6, atol=0.0)


def _memory(**changes) -> HebbianMemory:
    model = model_of(config_of(num_layers=1, **changes))
    return model.block_0.memory


def test_plasticity_is_a_saved_buffer_in_fp32_that_scales_every_decay():
    memory = _memory(plasticity=0.5)
    decay = torch.randn(5, 1, 4, dtype=torch.float64)
    whole = memory.log_decay(decay)
    memory.set_plasticity(0.25)
    torch.testing.assert_close(memory.log_decay(decay), whole - torch.tensor(2.0).log())
    saved = memory.state_dict()["plasticity"]
    assert saved.tolist() == [0.25]
    assert memory.bfloat16().plasticity.dtype == torch.float32
    for alpha in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"plasticity=\S+ must be above 0 and at most 1"):
            memory.set_plasticity(alpha)


def test_the_memory_begins_by_keeping_and_its_vectors_do_not_decay():
    """Initial values and roles travel with the layer: gates are gates, biases and gains vectors."""
    model = FAMILY.layer_specs(config_of())[1]
    block = model.module(ctx=ParallelContext.single(), **model.kwargs)
    roles = {name: role_of(name, p) for name, p in block.named_parameters()}
    vectors = {name for name, role in roles.items() if role == "vector"}
    assert vectors == {
        "norm.weight",
        "mlp_norm.weight",
        "memory.decay_bias",
        "fusion.gains",
        "fusion.gate_bias",
    }
    assert {n for n, role in roles.items() if role == "gate"} == {
        "memory.decay.weight",
        "fusion.gate",
    }
    memory = model_of(config_of(num_layers=1)).block_0.memory
    assert memory.decay_bias.init.value == 4.0
    assert memory.decay.weight.init.std == config_of().init_std


class _Largest(TorchDispatchMode):
    """The most elements that one tensor of a computation has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("segmented", [False, True])
def test_no_tensor_grows_with_the_square_of_the_length(segmented):
    model = model_of(config_of(num_layers=1, memory_chunk_size=4), segmented=segmented)
    sizes = []
    for length in (2048, 8192):
        tokens = text_of(length)
        ids = torch.zeros(1, length, dtype=torch.int32) if segmented else None
        with _Largest() as largest:
            model(TokenInputs(tokens, ids)).logits.sum().backward()
        sizes.append(largest.numel)
    assert sizes[1] <= 4.1 * sizes[0]
