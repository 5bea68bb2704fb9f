"""Families at the shapes of 125M models, where the device's fast kernels serve them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from models.generate import generate
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.moe import Experts
from parallel.sharding import Normal
from pretrain.engine.build import compile_layers
from tests.gpu import checks
from tests.gpu.checks import CHOOSING, FAMILIES, Step, packed_tokens, random_tokens
from tests.gpu.device import DEVICE

IS_CUDA = DEVICE.type == "cuda"
case_of = checks.real_case if IS_CUDA else checks.small_case
LENGTH = 2048 if IS_CUDA else 32
BATCHES = {"plain": random_tokens, "packed": packed_tokens}
# Kernels of a layer in a pass and its gradients, without recomputation: counted by hand for llama
# (24 forward, 36 backward) and Daria-Former (429 and 625) before some were joined.
KERNELS = {"llama": 75, "daria_former": 1250}

every_family = pytest.mark.parametrize("name", FAMILIES)
every_batch = pytest.mark.parametrize("batch", BATCHES)
on_cuda = pytest.mark.skipif(not IS_CUDA, reason="of the kernels of CUDA")


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()
    if IS_CUDA:
        torch.cuda.empty_cache()


def _step(name: str, batch: str, *, rows: int = 2) -> Step:
    case = case_of(name)
    return Step(case, DEVICE, "bf16", BATCHES[batch](case, DEVICE, rows=rows, length=LENGTH))


@every_batch
@every_family
def test_bf16_follows_fp32_in_the_loss_and_in_all_gradients(name, batch):
    case = case_of(name)
    found = checks.bf16_distance(case, DEVICE, BATCHES[batch](case, DEVICE, rows=2, length=LENGTH))
    assert found.loss < 1e-2
    if name not in CHOOSING:
        assert found.gradient < 0.15


@every_batch
@every_family
def test_attention_is_never_torchs_form_without_a_kernel(name, batch):
    kernels = checks.attention_kernels(_step(name, batch))
    assert "math" not in kernels
    assert kernels
    if IS_CUDA:
        fused = ("flash", "cudnn", "efficient", "flex")
        assert all(any(kind in kernel for kind in fused) for kernel in kernels), kernels


@every_batch
@every_family
def test_a_pass_and_its_gradients_never_wait_for_the_device(name, batch):
    if not IS_CUDA and name in checks.ASKS_A_CPU:
        pytest.skip("on a CPU its attention asks for the parts that have keys")
    step = _step(name, batch)
    step()
    with checks.without_waiting(DEVICE):
        step()


@on_cuda
@every_family
def test_a_layer_starts_no_more_kernels_than_its_operations(name):
    step = _step(name, "plain", rows=1)
    counted = checks.operations(step)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = sum(
        event.count for event in recorded.key_averages() if event.self_device_time_total > 0
    )
    number = step.config.num_layers
    print(
        f"{name}: {kernels / number:.0f} kernels, {counted.bytes / number / 1e9:.2f} GB per layer"
    )
    assert 0 < kernels <= 1.5 * counted.names.total()
    if name in KERNELS:
        # Embedding, head and loss are in it, too.
        assert kernels <= KERNELS[name] * number + 100


@every_family
def test_compiled_layers_are_few_graphs_without_breaks(name):
    torch._dynamo.reset()
    counters.clear()
    step = _step(name, "plain", rows=1)
    expected = step()
    step.model.zero_grad()
    compile_layers(step.model, num_lengths=1, backend="inductor" if IS_CUDA else "aot_eager")
    loss = step()
    assert not counters["graph_break"]
    # A graph of each kind of layer, and twice where the first one of a kind is told apart.
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_compiled_decoding_writes_the_tokens_of_eager_steps():
    """In fp64; on CUDA each step starts one graph."""
    case = case_of("llama")
    decoder = (
        SequentialModel(
            case.family.layer_specs(case.config), ParallelContext.single(device=DEVICE), seed=0
        )
        .eval()
        .double()
    )
    prompt = random_tokens(case, DEVICE, rows=2, length=16).inputs.tokens
    expected = generate(decoder, prompt, max_new_tokens=24)
    for _ in range(2):  # the second time with what the first has compiled and recorded
        rows = generate(decoder, prompt, max_new_tokens=24, compiled=True)
        assert torch.equal(rows, expected)
    if IS_CUDA:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            generate(decoder, prompt, max_new_tokens=24, compiled=True)
        launches = [e.count for e in recorded.key_averages() if e.key == "cudaGraphLaunch"]
        assert launches == [23]


def test_grouped_products_of_experts_are_those_of_each_expert():
    """In bf16, one expert without tokens; on a CPU in torch's form without a kernel."""
    experts = Experts(
        64, 96, num_experts=4, ctx=ParallelContext.single(device=DEVICE),
        init=Normal(0.1), output_init=Normal(0.1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    experts.to(torch.bfloat16)
    x = torch.randn(50, 64, generator=generator).to(DEVICE, torch.bfloat16)
    counts = [17, 0, 30, 3]
    if IS_CUDA and torch.cuda.get_device_capability() >= (9, 0):
        assert experts.multiplies_grouped(x)
    inputs = (x.requires_grad_(), *experts.parameters())
    grouped = experts.grouped(x, torch.tensor(counts, device=DEVICE))
    alone = experts(x, counts)
    upstream = torch.randn(alone.shape, generator=generator).to(alone)
    found, expected = ((y, *torch.autograd.grad(y, inputs, upstream)) for y in (grouped, alone))
    for ours, theirs in zip(found, expected, strict=True):
        # Three products in a row, each rounded once.
        bound = 4 * torch.finfo(torch.bfloat16).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=bound)
