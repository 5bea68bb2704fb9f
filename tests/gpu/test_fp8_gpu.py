"""FP8 through Transformer Engine, or the refusal of it where the package is not usable."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.context import ParallelContext
from parallel.layers import ColumnParallelLinear
from parallel.precision import FP8_BACKENDS, Precision
from tests.benchmarks.training import LEARNING_RATE, random_batch, run_config, start_engine
from tests.gpu.device import DEVICE
from tests.gpu.device_runs import DeviceRun
from tests.gpu.test_training_gpu import MODEL, SEQ, STEPS
from tests.missing import cannot_run
from tests.parallel.fp8.test_layers import CONFIGS as FP8_CONFIGS
from tests.pretrain.tiny_run import metrics


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
    backends = FP8_BACKENDS if recipe == "tensorwise" else ("transformer_engine", "emulated")
    try:
        precisions = [Precision("fp8", recipe, backend) for backend in backends]
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
    *by_kernels, by_emulation = results
    pairs = [pair for each in by_kernels for pair in zip(each, by_emulation, strict=True)]
    for kernel, emulated in pairs:
        # bf16 results of equal operands: 2^-8 each, and gradients of y that differ by as much,
        # which rounds some to the neighbouring FP8 number.
        scale = emulated.float().abs().max()
        assert (kernel.float() - emulated.float()).abs().max() < 2e-2 * scale


def _backend() -> str:
    """The kernels on CUDA; on a CPU, where these tests are only tried, the emulation."""
    lacks = _transformer_engine()
    if DEVICE.type == "cuda" and lacks is not None:
        cannot_run(lacks, needs="FP8")
    return "transformer_engine" if DEVICE.type == "cuda" else "emulated"


def _fp8(backend: str, recipe: str = "tensorwise") -> dict[str, str]:
    return {
        "training__precision": "fp8",
        "training__fp8_recipe": recipe,
        "training__fp8_backend": backend,
    }


def _run(folder: Path, name: str, **settings: Any) -> DeviceRun:
    return DeviceRun(
        folder,
        model=FP8_CONFIGS[name].model_dump(),
        training__max_steps=60,
        checkpoint__interval=20,
        evaluation__interval=60,
        **settings,
    )


@pytest.mark.parametrize("name", sorted(FP8_CONFIGS))
def test_a_run_of_every_family_learns_saves_and_goes_on(name, tmp_path):
    settings = _fp8(_backend())
    whole, killed = (_run(tmp_path / each, name, **settings) for each in ("whole", "killed"))
    whole.complete()
    trained = metrics(whole.config)[0]
    assert trained[-1]["loss"] < trained[0]["loss"]
    killed.kill_after(20)
    assert "continuing after step" in killed.complete()
    for expected, found in zip(trained, metrics(killed.config)[0], strict=True):
        # Sums of CUDA's kernels differ between runs, and 8 bits round them to other numbers.
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-2)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_recomputation_changes_nothing(recipe, tmp_path):
    settings = _fp8(_backend(), recipe)
    runs = []
    for recomputation in ("none", "full"):
        settings["training__activation_recomputation"] = recomputation
        runs.append(_run(tmp_path / recomputation, "llama", **settings))
        runs[-1].complete()
    for expected, found in zip(*(metrics(run.config)[0] for run in runs), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-2)


def test_the_history_of_delayed_goes_on_after_a_kill(tmp_path):
    if _backend() == "emulated":
        pytest.skip("the emulation has no history; tests/parallel/fp8/test_history.py packs one")
    settings = _fp8("transformer_engine", "delayed")
    whole, killed = (_run(tmp_path / each, "llama", **settings) for each in ("whole", "killed"))
    whole.complete()
    killed.kill_after(20)
    assert "continuing after step" in killed.complete()
    pairs = zip(metrics(whole.config)[0], metrics(killed.config)[0], strict=True)
    for expected, found in pairs:
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-2)
