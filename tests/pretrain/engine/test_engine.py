"""Complete runs at every layout and ZeRO stage against one process and a plain torch loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading.builders import build_eval_batches, build_train_loader
from models.base import TokenInputs
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.config import RunConfig
from pretrain.engine.lr_schedule import learning_rate
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import final_weights, metrics, tiny_run
from tests.tiers import tiered
from tests.tolerance import BF16_LOSS, BF16_NORM, FP32_LOSS, FP32_NORM

STEPS = 4


@pytest.fixture(scope="module")
def reference(data):
    """Losses, norms and held-out loss of the run without any engine."""
    config = tiny_run(data)
    training, family = config.training, get_family("llama")
    common = {"sequence_length": 32, "data_rank": 0, "data_size": 1, "vocab_size": 61}
    loader = build_train_loader(
        config.data, micro_batch_size=4, micro_batches_per_step=2, seed=training.seed, **common
    )
    ctx = ParallelContext.single()
    model = SequentialModel(family.layer_specs(config.model), ctx, seed=training.seed)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=training.betas, eps=training.eps, weight_decay=training.weight_decay,
    )  # fmt: skip
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        total = 0.0
        for _ in range(2):
            batch = next(loader)
            output = model(TokenInputs(batch.tokens))
            loss, _ = family.loss(output, batch.labels, config=config.model, ctx=ctx)
            (loss / 2).backward()
            total += loss.item() / 2
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training, total_steps=STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    loader.close()
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for batch in build_eval_batches(config.data, micro_batch_size=1, **common):
            nats += family.token_losses(model(TokenInputs(batch.tokens)), batch.labels, ctx).sum()
            tokens += (batch.labels != -100).sum().item()
    assert max(norms) > training.grad_clip, "the clipping must bite"
    return losses, norms, float(nats) / tokens


LAYOUTS = {
    "one process, ZeRO-0": (1, 0, {}),
    "one process, ZeRO-1": (1, 1, {}),
    "one process, ZeRO-2": (1, 2, {}),
    "one process, ZeRO-3": (1, 3, {}),
    "one process, recomputed": (1, 1, {"training__activation_recomputation": "full"}),
    "data 2, ZeRO-1": (2, 1, {"training__batch_size": 2}),
    "data 2, ZeRO-2": (2, 2, {"training__batch_size": 2}),
    "data 2, ZeRO-3": (2, 3, {"training__batch_size": 2, "training__logits_parts": 4}),
    "no accumulation": (
        1, 1, {"training__batch_size": 8, "training__gradient_accumulation_steps": 1},
    ),
    "tensor 2, ZeRO-0": (2, 0, {"parallel__tensor": 2}),
    "tensor 2, sequence parallel": (
        2, 1, {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    ),
    "tensor 2, sequence parallel, logits in parts": (
        2, 1,
        {
            "parallel__tensor": 2,
            "parallel__sequence_parallel": True,
            "training__logits_parts": 4,
            "training__activation_recomputation": "full",
        },
    ),
    "tensor 2 x data 2, ZeRO-3": (4, 3, {"parallel__tensor": 2, "training__batch_size": 2}),
    "pipeline 2": (2, 1, {"parallel__pipeline": 2}),
    "pipeline 4, recomputed": (
        4, 1, {"parallel__pipeline": 4, "training__activation_recomputation": "full"},
    ),
    "pipeline 2, tied": (
        2, 1,
        {
            "parallel__pipeline": 2,
            "model__tie_embeddings": True,
            "training__logits_parts": 2,
        },
    ),
    "pipeline 2 x tensor 2 x data 2": (
        8, 1, {"parallel__pipeline": 2, "parallel__tensor": 2, "training__batch_size": 2},
    ),
}  # fmt: skip


def _train(data: Path, tmp_path: Path, world_size: int, stage: int, **changes) -> RunConfig:
    config = tiny_run(data, run_dir=str(tmp_path / "run"), **changes)
    codes = run_ranks(run_training, world_size, config, f"configs/ds/zero{stage}.json", init=False)
    assert codes == [0] * world_size
    return config


ORDINARY = [
    "one process, ZeRO-0",
    "data 2, ZeRO-2",
    "data 2, ZeRO-3",
    "tensor 2, sequence parallel",
    "pipeline 4, recomputed",
    "pipeline 2 x tensor 2 x data 2",
]


@pytest.mark.parametrize("layout", tiered((n for n in LAYOUTS if "tied" not in n), ORDINARY))
def test_a_run_at_any_layout_equals_a_plain_torch_loop(layout, data, reference, tmp_path):
    world_size, stage, changes = LAYOUTS[layout]
    trained, evaluated = metrics(_train(data, tmp_path, world_size, stage, **changes))
    losses, norms, eval_loss = reference
    assert [r["loss"] for r in trained] == pytest.approx(losses, rel=FP32_LOSS)
    assert [r["grad_norm"] for r in trained] == pytest.approx(norms, rel=FP32_NORM)
    assert evaluated[-1]["eval_loss"] == pytest.approx(eval_loss, rel=FP32_LOSS)


def test_a_tied_head_trains_alike_in_one_process_and_across_stages(data, tmp_path):
    world_size, stage, changes = LAYOUTS["pipeline 2, tied"]
    tied = {"model__tie_embeddings": True}
    whole, _ = metrics(_train(data, tmp_path / "whole", 1, 1, **tied))
    cut, _ = metrics(_train(data, tmp_path / "cut", world_size, stage, **changes))
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in cut] == pytest.approx([r[name] for r in whole], rel=FP32_LOSS)


def test_a_multiplier_that_one_stage_alone_has_trains_alike_across_stages(data, tmp_path):
    slower = {"training__lr_multipliers": {"head": 0.5}}
    whole, _ = metrics(_train(data, tmp_path / "whole", 1, 1, **slower))
    cut, _ = metrics(_train(data, tmp_path / "cut", 2, 1, parallel__pipeline=2, **slower))
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in cut] == pytest.approx([r[name] for r in whole], rel=FP32_LOSS)


@pytest.mark.parametrize("multipliers", [{"embedding": 0.1, "head": 0.5}, {"head": 0.0}], ids=str)
def test_a_tied_matrix_has_one_learning_rate_at_every_layout(multipliers, data, tmp_path):
    changes = {"model__tie_embeddings": True, "training__lr_multipliers": multipliers}
    whole = _train(data, tmp_path / "whole", 1, 0, **changes)
    cut = _train(data, tmp_path / "cut", 2, 1, parallel__pipeline=2, **changes)
    for name in ("loss", "grad_norm"):
        expected = [r[name] for r in metrics(whole)[0]]
        assert [r[name] for r in metrics(cut)[0]] == pytest.approx(expected, rel=FP32_LOSS)
    name = "embedding.tokens.weight"
    torch.testing.assert_close(final_weights(cut)[name], final_weights(whole)[name])


BF16 = {"training__precision": "bf16"}


@pytest.mark.parametrize(
    ("world_size", "stage", "changes"),
    [(1, 1, {}), (2, 2, {"training__batch_size": 2}), (2, 1, {"parallel__pipeline": 2})],
    ids=["one process", "data 2, ZeRO-2", "pipeline 2"],
)
def test_bf16_follows_fp32_as_far_as_bf16_allows(
    world_size, stage, changes, data, reference, tmp_path
):
    trained, _ = metrics(_train(data, tmp_path, world_size, stage, **BF16, **changes))
    assert [r["loss"] for r in trained] == pytest.approx(reference[0], rel=BF16_LOSS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_whose_gradients_all_count_elsewhere_trains_alike(precision, data, tmp_path):
    """The last stage is a norm and a tied matrix, which its second tensor rank does not count."""
    common = {
        "model__num_layers": 2,
        "model__vocab_size": 2000,  # so that the head costs more than both blocks
        "model__tie_embeddings": True,
        "training__precision": precision,
    }
    whole, _ = metrics(_train(data, tmp_path / "whole", 1, 1, **common))
    cuts = {"parallel__pipeline": 2, "parallel__tensor": 2}
    cut, _ = metrics(_train(data, tmp_path / "cut", 4, 1, **common, **cuts))
    bounds = (BF16_LOSS, BF16_NORM) if precision == "bf16" else (FP32_LOSS, FP32_NORM)
    for name, bound in zip(("loss", "grad_norm"), bounds, strict=True):
        assert [r[name] for r in cut] == pytest.approx([r[name] for r in whole], rel=bound)


def test_muon_trains_where_deepspeed_clips_it_rightly(data, tmp_path):
    trained, _ = metrics(
        _train(data, tmp_path, 1, 1, training__optimizer="muon", training__max_steps=8, **BF16)
    )
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_the_metrics_of_a_run_have_the_promised_keys(data, tmp_path):
    trained, evaluated = metrics(_train(data, tmp_path, 1, 1))
    keys = {"step", "loss", "lm_loss", "grad_norm", "lr", "tokens", "tokens_per_second"}
    assert all(keys <= set(record) for record in trained)
    assert [record["tokens"] for record in trained] == [256, 512, 768, 1024]
    assert "mfu" not in trained[-1], "the peak of a CPU is unknown"
    for record in evaluated:
        assert record["perplexity"] == pytest.approx(math.exp(record["eval_loss"]))
        assert record["bits_per_byte"] > 0
