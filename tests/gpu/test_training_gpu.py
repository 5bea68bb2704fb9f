"""Training in the engine of a run on one CUDA device; the oracle is a torch loop on the CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._dynamo.utils import counters

from models.base import TokenInputs
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.config import LoggingConfig, RunConfig
from pretrain.metrics.profile import StepProfiler
from tests.benchmarks.training import LEARNING_RATE, random_batch, run_config, start_engine

STEPS, SEQ = 5, 64
MODEL = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": SEQ,
    "init_std": 0.05,
}


def _run(**training) -> RunConfig:
    return run_config(MODEL, seq_length=SEQ, batch_size=4, seed=3, **training)


def _losses(config: RunConfig, device: torch.device, *, zero_stage: int) -> list[float]:
    """Losses of steps over one batch again and again, so that they must fall."""
    engine = start_engine(config, device=device, ds_config=f"configs/ds/zero{zero_stage}.json")
    losses = []
    for _ in range(STEPS):
        batches = iter([random_batch(config, seed=1)])
        losses.append(engine.train_step(batches, learning_rate=LEARNING_RATE).loss.item())
    del engine
    gc.collect()
    return losses


@pytest.fixture(scope="module")
def reference() -> list[float]:
    """The losses of plain fp32 training on the CPU."""
    config = _run(precision="fp32")
    training, family, ctx = config.training, get_family("llama"), ParallelContext.single()
    model = SequentialModel(family.layer_specs(config.model), ctx, seed=training.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
    )
    batch, losses = random_batch(config, seed=1), []
    for _ in range(STEPS):
        output = model(TokenInputs(batch.tokens))
        loss = family.loss(output, batch.labels, config=config.model, ctx=ctx).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, "the reference must learn"
    return losses


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_fp32_at_every_zero_stage_equals_a_plain_loop_on_the_cpu(
    zero_stage, process_device, reference
):
    losses = _losses(_run(precision="fp32"), process_device, zero_stage=zero_stage)
    assert losses == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_follows_fp32_on_the_cpu_as_far_as_bf16_allows(zero_stage, process_device, reference):
    losses = _losses(_run(precision="bf16"), process_device, zero_stage=zero_stage)
    assert losses == pytest.approx(reference, rel=1e-2)
    assert losses[-1] < losses[0] - 0.1


def test_recomputed_activations_change_nothing(process_device, reference):
    config = _run(precision="fp32", activation_recomputation="full")
    assert _losses(config, process_device, zero_stage=1) == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_compiled_layers_train_to_the_losses_of_eager_ones(
    precision, tolerance, process_device, reference
):
    counters.clear()
    config = _run(precision=precision, compile=True)
    assert _losses(config, process_device, zero_stage=1) == pytest.approx(reference, rel=tolerance)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


def test_a_profiled_step_has_the_same_loss_and_device_times(process_device, tmp_path):
    """The snapshot of memory, too, which only CUDA has."""
    on_cuda = process_device.type == "cuda"
    losses = []
    for name in ("plain", "profiled"):
        engine = start_engine(_run(precision="fp32"), device=process_device)
        profiler = StepProfiler(
            LoggingConfig(profile_steps=((1, 1),), memory_snapshot=on_cuda),
            tmp_path,
            engine,
            rank=0,
        )
        if name == "profiled":
            profiler.start(1)
        with profiler.step(1):
            batches = iter([random_batch(engine.spec.config, seed=1)])
            losses.append(engine.train_step(batches, learning_rate=LEARNING_RATE).loss.item())
        summary = profiler.end()
        assert (summary is None) == (name == "plain")
        del engine
        gc.collect()
    assert losses[0] == losses[1]
    kinds = ["json.gz", *(["memory.pickle"] if on_cuda else []), "txt"]
    files = sorted((tmp_path / "profile" / "steps_1_1").iterdir())
    assert [file.name for file in files] == [f"rank_0.{kind}" for kind in kinds]
    assert all(f"{phase} " in files[-1].read_text() for phase in ("forward", "backward"))
