"""Rows scored in parts by the engine of a run have the scores that each of them has alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import TokenInputs
from models.evaluation.scoring import Request, Score, score
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import Axis, ParallelContext
from pretrain.config import RunConfig
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.distributed.process_groups import build_rank_group, process_group
from pretrain.engine import part_scoring
from pretrain.engine.build import build_engine
from pretrain.engine.part_scoring import PartScoring, parts_of
from pretrain.engine.train_spec import Targets, TrainSpec, build_context, build_precision
from pretrain.run_data import open_training_data
from pretrain.task_evaluation import TaskEvaluation
from tests.distributed import run_ranks
from tests.models.evaluation.test_scoring import FAMILIES, alone, double, requests, rows
from tests.models.families import CASES
from tests.pretrain.tiny_run import SEQ, tiny_run, write_data
from tests.tolerance import FP32_LOSS, FP64


def spec_of(config: RunConfig, ctx: ParallelContext) -> TrainSpec:
    return TrainSpec.of(config, resolve_ds_config(None, config, data_size=1), ctx)


def by_parts(
    of: SequentialModel, given: Sequence[Request], config: RunConfig, *, data_size: int
) -> list[Score]:
    """The scores of all data ranks, one after the other, in parts of two rounds."""
    scores: dict[int, Score] = {}
    size = config.training.batch_size * data_size
    for part in parts_of(given, lengths=[48, 24, 12], round_size=size, num_rounds=2):
        counts = set()
        for rank in range(data_size):
            ctx = dataclasses.replace(of.ctx, data=Axis(data_size, rank))
            scoring = PartScoring(spec_of(config, ctx), part)
            batches = scoring.batches()
            counts.add(len(batches))
            for batch in batches:
                assert batch.tokens.shape == (config.training.batch_size, part.tokens.shape[1])
                with torch.no_grad():
                    output = of(TokenInputs(batch.tokens, batch.segment_ids))
                loss, _ = scoring(output, Targets(batch.labels))
                assert loss == 0
            for number, total, wrong in zip(*scoring.scores(), strict=True):
                assert number not in scores
                scores[int(number)] = Score(float(total), wrong == 0)
        assert len(counts) == 1, "every data rank has as many batches"
    return [scores[number] for number in range(len(given))]


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_rows_of_several_data_ranks_score_as_each_of_them_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_scoring, "_TOKENS", 5)
    of = double(name)
    given = requests(of)
    config = tiny_run(tmp_path, model=CASES[name].config.model_dump(), training__batch_size=2)
    found = by_parts(of, given, config, data_size=2)
    expected = [alone(of, request) for request in given]
    assert [s.is_greedy for s in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose(
        [s.log_likelihood for s in found], [value for value, _ in expected], **FP64
    )


def test_a_row_gets_the_smallest_length_that_holds_it_and_parts_are_whole_rounds() -> None:
    lengths = [2, 12, 13, 24, 25, 48]
    given = [Request([*range(n), 7], 1) for n in lengths]
    parts = list(parts_of(given, lengths=[48, 24, 12], round_size=2, num_rounds=1))
    assert [part.tokens.shape for part in parts] == [(2, 48), (2, 24), (2, 12)]
    assert [part.entries[:, 3].tolist() for part in parts] == [[4, 5], [2, 3], [0, 1]]
    (lone,) = parts_of(given[:1], lengths=[48, 24, 12], round_size=4, num_rounds=3)
    assert lone.tokens.shape == (4, 12)
    assert lone.tokens[0, :2].tolist() == [0, 1]
    assert not lone.tokens[1:].any()


LAYOUTS = {
    "one process": (1, {}, 0),
    "tensor 2 x data 2, ZeRO-3": (4, {"parallel__tensor": 2}, 3),
    "tensor 2 x pipeline 2, sequence parallel": (
        4,
        {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence_parallel": True},
        1,
    ),
    "pipeline 2 x data 2, packed": (
        4,
        {"parallel__pipeline": 2, "data__reset_at_documents": True},
        1,
    ),
}


def in_training(
    config: RunConfig, zero: int, given: Sequence[Request]
) -> tuple[list[Score] | None, float]:
    """The scores that rank 0 gets with the engine of a run, and the loss of a step after them."""
    with process_group(tensor_size=config.parallel.tensor) as device:
        ctx = build_context(config, precision=build_precision(config), device=device)
        ds_config = resolve_ds_config(
            f"configs/ds/zero{zero}.json", config, data_size=ctx.data.size
        )
        engine = build_engine(TrainSpec.of(config, ds_config, ctx))
        ranks = build_rank_group(60.0)
        parts: list[str] = []
        tasks = TaskEvaluation(config, None, ranks, parts.append)  # type: ignore[arg-type]
        tasks._engine = engine
        before = torch.get_rng_state()
        scores, failure = tasks._lead(lambda: tasks._score(given, progress=lambda number: None))
        assert failure is None
        assert torch.equal(torch.get_rng_state(), before)
        assert bool(given) == any("batch 1" in part for part in parts), "signs of life"
        engine.set_sequence_length(config.data.sequence_length)
        with open_training_data(config, ctx.data) as loader:
            engine.train_step(loader, learning_rate=1e-2)
            return scores, float(engine.train_step(loader, learning_rate=1e-2).loss)


@pytest.fixture(scope="module")
def given() -> list[Request]:
    """More rows than fit in one part of any layout."""
    drawn = rows(40, SEQ + 1).tolist()
    return [Request(row[: 3 + number % SEQ], 1 + number % 2) for number, row in enumerate(drawn)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_engine_of_every_layout_scores_as_one_process(
    layout: str, tmp_path: Path, given: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it trains on as if it had not."""
    monkeypatch.setattr("pretrain.task_evaluation._UNIT", 8)
    monkeypatch.setattr("pretrain.task_evaluation._BATCHES", 2)
    monkeypatch.setattr("pretrain.task_evaluation._BATCHES_A_STAGE", 1)
    size, changes, zero = LAYOUTS[layout]
    config = tiny_run(tmp_path, **changes, training__batch_size=2)
    write_data(tmp_path)
    ends = run_ranks(in_training, size, config, zero, given, init=False)
    if config.parallel.pipeline > 1:  # where wires are exchanged for others, and back
        undisturbed = run_ranks(in_training, size, config, zero, [], init=False)
        assert [loss for _, loss in ends] == [loss for _, loss in undisturbed]
    found, *others = [scores for scores, _ in ends]
    assert others == [None] * (size - 1)
    layer_specs = get_family("llama").layer_specs(config.model)
    single = ParallelContext.single()
    whole = SequentialModel(layer_specs, single, seed=config.training.seed).eval()
    expected = score(whole, given, batch_size=4)
    assert [s.is_greedy for s in found] == [s.is_greedy for s in expected]
    assert {s.is_greedy for s in expected} == {True, False}
    assert [s.log_likelihood for s in found] == pytest.approx(
        [s.log_likelihood for s in expected], rel=FP32_LOSS
    )
