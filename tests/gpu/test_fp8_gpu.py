"""FP8 through Transformer Engine, or the refusal of it where the package is not usable."""

from __future__ import annotations

import gc

import pytest
import torch

from parallel.precision import Precision
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
    kinds = {type(module).__module__.partition(".")[0] for module in engine.module.modules()}
    assert ("transformer_engine" in kinds) == (config.training.precision == "fp8")
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
