"""FP8 through Transformer Engine, or the refusal of it where the package is not usable."""

from __future__ import annotations

import gc

import pytest
import torch

from parallel.context import ParallelContext
from parallel.layers import ColumnParallelLinear
from parallel.precision import FP8_BACKENDS, Precision
from tests.benchmarks.training import LEARNING_RATE, random_batch, run_config, start_engine
from tests.gpu.test_training_gpu import MODEL, SEQ, STEPS
from tests.missing import cannot_run


def _transformer_engine() -> str | None:
    """None when it works here, otherwise why not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "this CUDA device has no FP8"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a broken install raises RuntimeError and OSError, too
        return f"Transformer Engine: {type(error).__name__}: {error}"
    return None


def _losses(device: torch.device, **training) -> list[float]:
    config = run_config(MODEL, seq_length=SEQ, batch_size=4, seed=3, **training)
    engine = start_engine(config, device=device)
    kinds = {base for module in engine.module.modules() for base in type(module).__mro__}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    assert ("transformer_engine" in packages) == (config.training.precision == "fp8")
    losses = []
    for _ in range(STEPS):
        batches = iter([random_batch(config, seed=1)])
        losses.append(engine.train_step(batches, learning_rate=LEARNING_RATE).loss.item())
    del engine
    gc.collect()
    return losses


def test_fp8_is_accepted_where_it_works_and_refused_with_a_remedy_elsewhere():
    if _transformer_engine() is None:
        assert Precision("fp8", "delayed").name == "fp8"
        return
    with pytest.raises(ValueError, match=r"precision=fp8 needs .*use precision=bf16"):
        Precision("fp8", "delayed")


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_training_follows_bf16(recipe, process_device):
    lacks = _transformer_engine()
    if lacks is not None:
        cannot_run(lacks, needs="FP8")
    expected = _losses(process_device, precision="bf16")
    losses = _losses(process_device, precision="fp8", fp8_recipe=recipe)
    assert losses == pytest.approx(expected, rel=5e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_the_kernels_compute_what_the_emulation_computes(recipe, process_device):
    """Losses and gradients of one layer: operands are the same, sums are in another order."""
    lacks = _transformer_engine()
    if lacks is not None:
        cannot_run(lacks, needs="FP8")
    try:
        precisions = [Precision("fp8", recipe, backend) for backend in FP8_BACKENDS]
    except ValueError as error:  # the chip lacks the recipe
        cannot_run(str(error), needs="FP8")
    torch.manual_seed(0)
    x = torch.randn(64, 4, 256, device=process_device, dtype=torch.bfloat16)
    weight = torch.randn(512, 256, device=process_device) / 16
    results = []
    for precision in precisions:
        ctx = ParallelContext.single(device=process_device, precision=precision)
        layer = ColumnParallelLinear(256, 512, ctx=ctx).to(torch.bfloat16)
        with torch.no_grad():
            layer.get_parameter("weight").copy_(weight)
        own = x.clone().requires_grad_()
        with precision.autocast():
            y = layer(own)
        y.float().square().mean().backward()
        results.append((y, own.grad, layer.get_parameter("weight").grad))
    for kernel, emulated in zip(*results, strict=True):
        # bf16 results of equal operands: 2^-8 each, and gradients of y that differ by as much,
        # which rounds some to the neighbouring FP8 number.
        scale = emulated.float().abs().max()
        assert (kernel.float() - emulated.float()).abs().max() < 2e-2 * scale
