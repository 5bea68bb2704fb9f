"""A global batch that grows in a run or at a resume: the losses of a plain loop over the same
samples, at every layout and over a resume."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading.batch import IGNORED_LABEL
from data_tools.loading.builders import build_train_loader
from models.base import TokenInputs
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.config import ConfigError, RunConfig, parse_config
from pretrain.config.layout import check_layout
from pretrain.engine.lr_schedule import learning_rate
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.run_values import run_values
from tests.pretrain.tiny_run import SEQ, VOCAB, metrics, stopped_after, tiny_run
from tests.refusals import assert_refused
from tests.tiers import tiered

RAMP = [
    {"until_tokens": 384, "sequences_per_step": 4},
    {"until_tokens": 900.0, "sequences_per_step": 8},
]
# Odd numbers of steps, so that no count of micro-batches happens to fit the next size.
SIZES = [4, 4, 4, 8, 8, 8, 16, 16]
TOKENS = [SEQ * sum(SIZES[: n + 1]) for n in range(len(SIZES))]


def _config(data: Path, run_dir: Path, **changes: Any) -> RunConfig:
    values = {
        "run_dir": str(run_dir),
        "data__reset_at_documents": True,  # so that micro-batches score different numbers of tokens
        "training__max_steps": len(SIZES),
        "training__gradient_accumulation_steps": 4,
        "training__batch_ramp": RAMP,
        "training__warmup_steps": 2,
        "checkpoint__interval": 100,
        "evaluation__interval": 100,
    }
    return tiny_run(data, **(values | changes))


class Curve(NamedTuple):
    losses: list[float]
    norms: list[float]


def _plain_loop(config: RunConfig, sizes: Sequence[int], left_out: Collection[int] = ()) -> Curve:
    """Steps over so many samples each, without any engine."""
    training, family, ctx = config.training, get_family("llama"), ParallelContext.single()
    loader = build_train_loader(
        config.data, sequence_length=SEQ, micro_batch_size=4, data_rank=0, data_size=1,
        seed=training.seed, vocab_size=VOCAB,
    )  # fmt: skip
    model = SequentialModel(
        family.layer_specs(config.model, segmented=True), ctx, seed=training.seed
    )
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=training.betas, eps=training.eps, weight_decay=training.weight_decay,
    )  # fmt: skip
    curve = Curve([], [])
    for step, size in enumerate(sizes, start=1):
        batches = [next(loader) for _ in range(size // 4)]
        if step in left_out:
            continue
        scored = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            output = model(TokenInputs(batch.tokens, batch.segment_ids))
            loss = family.token_losses(output, batch.labels, ctx).sum() / scored
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training, total_steps=len(sizes))
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(total)
        curve.norms.append(norm.item())
    loader.close()
    return curve


def _train(config: RunConfig, world_size: int = 1, *, stage: int = 1, entry=run_training) -> Any:
    return run_ranks(entry, world_size, config, f"configs/ds/zero{stage}.json", init=False)


def _assert_is(config: RunConfig, expected: Curve) -> None:
    trained, _ = metrics(config)
    assert [r["loss"] for r in trained] == pytest.approx(expected.losses, rel=1e-5)
    assert [r["grad_norm"] for r in trained] == pytest.approx(expected.norms, rel=1e-4)


@pytest.fixture(scope="module")
def ramped(data, tmp_path_factory) -> Curve:
    return _plain_loop(_config(data, tmp_path_factory.mktemp("unused")), SIZES)


# world size, ZeRO stage, other settings
LAYOUTS = {
    "one process, ZeRO-0": (1, 0, {}),
    "data 2, ZeRO-1": (2, 1, {"training__batch_size": 2}),
    "data 2, ZeRO-2": (2, 2, {"training__batch_size": 2}),
    "data 2, ZeRO-3": (2, 3, {"training__batch_size": 2}),
    "pipeline 2": (2, 1, {"parallel__pipeline": 2}),
    "pipeline 4": (4, 1, {"parallel__pipeline": 4}),
    "pipeline 2 x data 2": (4, 1, {"parallel__pipeline": 2, "training__batch_size": 2}),
    "tensor 2": (2, 1, {"parallel__tensor": 2}),
}


@pytest.mark.parametrize(
    "layout", tiered(LAYOUTS, ["one process, ZeRO-0", "data 2, ZeRO-3", "pipeline 2 x data 2"])
)
def test_a_ramp_trains_at_any_layout_like_a_plain_loop(layout, data, ramped, tmp_path):
    world_size, stage, changes = LAYOUTS[layout]
    config = _config(data, tmp_path / "run", **changes)
    assert _train(config, world_size, stage=stage) == [0] * world_size
    _assert_is(config, ramped)
    assert [r["tokens"] for r in metrics(config)[0]] == TOKENS


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(2, {"training__batch_size": 2}, id="data 2", marks=pytest.mark.slow),
        pytest.param(2, {"parallel__pipeline": 2}, id="pipeline 2"),
    ],
)
def test_a_run_continues_inside_a_ramp_bit_for_bit(world_size, changes, data, tmp_path):
    undisturbed = _config(data, tmp_path / "a", **changes)
    _train(undisturbed, world_size)
    curve = [(r["loss"], r["grad_norm"], r["tokens"], r["lr"]) for r in metrics(undisturbed)[0]]
    config = _config(data, tmp_path / "b", **changes)
    for stop in (2, 1, 2):  # after steps 2, 3 (where a size ends) and 5
        assert set(_train(config, world_size, entry=stopped_after(stop))) == {75}
    assert set(_train(config, world_size)) == {0}
    again = [(r["loss"], r["grad_norm"], r["tokens"], r["lr"]) for r in metrics(config)[0]]
    assert again == curve


def test_steps_that_are_left_out_have_the_size_of_their_place_in_the_ramp(data, tmp_path):
    config = _config(data, tmp_path / "run", stability__skip_steps=[[3, 4], [7, 7]])
    _train(config)
    _assert_is(config, _plain_loop(config, SIZES, left_out={3, 4, 7}))
    kept = [tokens for step, tokens in enumerate(TOKENS, start=1) if step not in (3, 4, 7)]
    assert [r["tokens"] for r in metrics(config)[0]] == kept


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(1, {}, id="one process"),
        pytest.param(2, {"training__batch_size": 2}, id="data 2", marks=pytest.mark.slow),
        pytest.param(2, {"parallel__pipeline": 2}, id="pipeline 2"),
    ],
)
def test_a_batch_changed_at_a_resume_trains_on_like_a_plain_loop(
    world_size, changes, data, tmp_path
):
    half = {"training__batch_ramp": [], "training__gradient_accumulation_steps": 2, **changes}
    whole = half | {"training__gradient_accumulation_steps": 4}
    begun = _config(data, tmp_path / "run", **half)
    assert set(_train(begun, world_size, entry=stopped_after(3))) == {75}
    config = _config(data, tmp_path / "run", **whole)
    assert set(_train(config, world_size)) == {0}
    _assert_is(config, _plain_loop(config, [8] * 3 + [16] * 5))
    assert [r["tokens"] for r in metrics(config)[0]] == [
        SEQ * n for n in (8, 16, 24, 40, 56, 72, 88, 104)
    ]
    trainer = tmp_path / "run" / "checkpoints" / "step_8" / "trainer.json"
    assert json.loads(trainer.read_text())["data"]["consumed_samples"] == 104


def test_max_tokens_counts_what_was_taken_before_the_batch_changed(data, tmp_path):
    limits = {"training__max_steps": None, "training__max_tokens": SEQ * 104}
    half = {"training__batch_ramp": [], "training__gradient_accumulation_steps": 2, **limits}
    _train(_config(data, tmp_path / "run", **half), entry=stopped_after(3))
    config = _config(data, tmp_path / "run", training__batch_ramp=[], **limits)
    _train(config)
    assert [r["tokens"] for r in metrics(config)[0]] == [
        SEQ * n for n in (8, 16, 24, 40, 56, 72, 88, 104)
    ]


@pytest.mark.parametrize(
    ("ramp", "parts"),
    [
        ([(100, 4), (100, 8)], ("batch_ramp.1.until_tokens", 100, "100", "order")),
        ([(100, 8), (200, 8)], ("batch_ramp.1.sequences_per_step", 8, "8", "order")),
        ([(0, 8)], ("training.batch_ramp.0.until_tokens", 0, "0", "change")),
        ([(100, 6)], ("batch_ramp.0.sequences_per_step", 6, ("4", "training.batch_size"), "4, 8")),
        ([(100, 3)], ("batch_ramp.0.sequences_per_step", 3, ("4", "training.batch_size"), "4")),
        ([(100, 16)], ("batch_ramp.0.sequences_per_step", 16, "16", "gradient_accumulation_steps")),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp, parts):
    entries = [{"until_tokens": until, "sequences_per_step": size} for until, size in ramp]
    changes = {"training__batch_size": 2, "training__gradient_accumulation_steps": 4}
    with assert_refused(*parts, error=ConfigError):
        check_layout(parse_config(run_values(**changes, training__batch_ramp=entries)), 2)
