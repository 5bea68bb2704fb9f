"""Pipeline stages in DeepSpeed's engine against one process and a plain torch loop.

The model is the awkward family: mixed dtypes, fields without gradient, tied parameters, auxiliary
losses. Four optimizer steps with clipping that bites.
"""

from __future__ import annotations

import deepspeed
import pytest
import torch

from models.base import TokenInputs
from parallel.carry import LayerSpec, SequentialModel
from parallel.context import ParallelContext
from parallel.cpu.compat import prepare_deepspeed
from parallel.pipeline import PipelineStage, layer_costs, partition
from parallel.precision import Precision
from parallel.sharding import sharding_table, sum_partial_gradients
from tests.distributed import run_ranks
from tests.models import awkward
from tests.refusals import assert_refused
from tests.tolerance import BF16_LOSS, BF16_NORM, FP32_LOSS, FP32_NORM

CONFIG = awkward.AwkwardConfig()
STEPS, LEARNING_RATE, CLIP, SEED = 4, 1e-2, 0.5, 11


def reference(accumulation: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, norms and final weights of one process without any engine."""
    ctx = ParallelContext.single()
    model = SequentialModel(awkward.layer_specs(CONFIG), ctx, seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for micro in range(accumulation):
            tokens, labels = awkward.batch(step * accumulation + micro)
            output = model(TokenInputs(tokens))
            loss, _ = awkward.loss(output, labels, config=CONFIG, ctx=ctx)
            (loss / accumulation).backward()
            total += loss.item() / accumulation
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, {n: p.detach().clone() for n, p in model.named_parameters()}


def train(
    *, pipeline: int, tensor: int = 1, accumulation: int, sequence_parallel: bool = False,
    precision: str = "fp32", recompute: bool = False, boundaries: list[int] | None = None,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """The same training through PipelineStage and PipelineEngine, as one rank runs it."""
    prepare_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    ctx = ParallelContext.from_world(
        tensor=tensor, pipeline=pipeline, sequence_parallel=sequence_parallel,
        precision=Precision(precision),
    )  # fmt: skip
    micro_batch = 2 // ctx.data.size
    stage = PipelineStage(
        awkward.layer_specs(CONFIG), ctx,
        schema=awkward.carry_schema(CONFIG, ctx, micro_batch_size=micro_batch, seq_length=16),
        inputs_type=TokenInputs,
        objective=lambda output, labels: awkward.loss(output, labels, config=CONFIG, ctx=ctx),
        loss_names=awkward.FAMILY.loss_names, seed=SEED, recompute=recompute, boundaries=boundaries,
    )  # fmt: skip
    sum_partial_gradients(stage, ctx)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    optimizer = torch.optim.AdamW(stage.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=config)
    batches = _micro_batches(ctx, micro_batch)
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(engine.train_batch(batches).item())
        norms.append(float(engine.get_global_grad_norm()))
    weights = {n: p.detach().float().clone() for n, p in stage.named_parameters()}
    return losses, norms, weights if ctx.tensor.size == 1 else {}


def _micro_batches(ctx: ParallelContext, micro_batch: int):
    step = 0
    while True:
        tokens, labels = awkward.batch(step)
        rows = slice(ctx.data.rank * micro_batch, (ctx.data.rank + 1) * micro_batch)
        yield (tokens[rows],), labels[rows]
        step += 1


def assert_equal_training(results, accumulation: int) -> None:
    losses, norms, weights = reference(accumulation)
    assert max(norms) > CLIP, "the clipping must bite for the norms to matter"
    for rank_losses, rank_norms, rank_weights in results:
        assert rank_losses == pytest.approx(losses, rel=FP32_LOSS)
        assert rank_norms == pytest.approx(norms, rel=FP32_NORM)
        for name, weight in rank_weights.items():
            torch.testing.assert_close(weight, weights[_canonical(name)], rtol=1e-3, atol=1e-4)


def _canonical(name: str) -> str:
    return "embedding.table.weight" if name == "head.out.weight" else name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("pipeline", [2, 4])
def test_pipeline_training_equals_one_process(pipeline, accumulation, recompute):
    results = run_ranks(
        train, pipeline, pipeline=pipeline, accumulation=accumulation, recompute=recompute
    )
    assert_equal_training(results, accumulation)


@pytest.mark.parametrize("cut", range(1, 8))
def test_two_stages_cut_at_any_layer_equal_one_process(cut):
    results = run_ranks(train, 2, pipeline=2, accumulation=2, boundaries=[0, cut, 8])
    assert_equal_training(results, 2)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_pipeline_with_tensor_ranks_equals_one_process(sequence_parallel):
    results = run_ranks(
        train, 4, pipeline=2, tensor=2, accumulation=4, sequence_parallel=sequence_parallel
    )
    assert_equal_training(results, 4)


def test_pipeline_with_data_ranks_equals_one_process():
    assert_equal_training(run_ranks(train, 4, pipeline=2, accumulation=2), 2)


def test_pipeline_in_bf16_follows_one_process_as_far_as_bf16_allows():
    results = run_ranks(train, 4, pipeline=4, accumulation=4, precision="bf16")
    losses, norms, _ = reference(4)
    for rank_losses, rank_norms, _ in results:
        assert rank_losses == pytest.approx(losses, rel=BF16_LOSS)
        assert rank_norms == pytest.approx(norms, rel=BF16_NORM)


def test_partition_minimises_the_most_expensive_stage_and_leaves_none_empty():
    assert partition([0, 5, 5, 5, 5, 9], 1) == [0, 6]
    assert partition([0, 5, 5, 5, 5, 9], 2) == [0, 4, 6]
    assert partition([1, 1, 1, 1], 4) == [0, 1, 2, 3, 4]
    assert partition([9, 0, 0, 0], 3)[1] == 1


def test_more_stages_than_layers_is_refused_with_both_numbers():
    with assert_refused(
        "parallel.pipeline", value=5, constraint="4 layers", remedy="parallel.pipeline to 4"
    ):
        partition([1, 1, 1, 1], 5)


def test_lookup_tables_cost_nothing_and_heads_do():
    costs = layer_costs(awkward.layer_specs(awkward.AwkwardConfig(num_layers=2)))
    assert costs[0] == 0
    assert costs[-1] == awkward.VOCAB * awkward.HIDDEN


def test_every_parameter_of_a_stage_declares_its_sharding():
    model = SequentialModel(awkward.layer_specs(CONFIG), ParallelContext.single())
    assert set(sharding_table(model)) == {name for name, _ in model.named_parameters()}


class _Forgetful(torch.nn.Module):
    def __init__(self, *, ctx):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))


def test_a_parameter_that_declares_no_sharding_is_refused_by_name():
    with assert_refused(
        "odd.weight", value=(2,), constraint="sharding", remedy="declare_replicated"
    ):
        SequentialModel([LayerSpec("odd", _Forgetful)], ParallelContext.single())
