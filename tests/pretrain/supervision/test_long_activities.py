"""Activities that last longer than the watchdog waits report their parts, and are left alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import distributed_c10d

import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.config import RunConfig
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.distributed.process_groups import process_group
from pretrain.engine.build import build_engine
from pretrain.engine.train_spec import TrainSpec, build_context, build_precision
from pretrain.errors import EXIT_COMPLETED, EXIT_HUNG
from pretrain.run_data import open_held_out_data
from pretrain.supervision import watchdog
from pretrain.supervision.heartbeats import RunRecord
from pretrain.supervision.progress import Progress
from pretrain.supervision.watchdog import Ending, Watchdog
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data

PATIENCE = 1.0


def watch(folder: Path, endings: list[Ending], *, timeout: float = PATIENCE) -> Watchdog:
    """A watchdog of this rank that only notes how it would end the process."""
    size = int(os.environ["WORLD_SIZE"])
    store = distributed_c10d._get_default_store() if size > 1 else None
    rank = int(os.environ["RANK"])
    return Watchdog(folder, rank=rank, size=size, store=store, timeout=timeout, end=endings.append)


def slow_evaluation(config: RunConfig, folder: Path) -> tuple[int, list[Ending]]:
    """Evaluate for more than twice the patience; the number of batches, and the verdicts."""
    endings: list[Ending] = []
    ds_config = resolve_ds_config("configs/ds/zero1.json", config, data_size=1)
    with process_group() as device:
        ctx = build_context(config, precision=build_precision(config), device=device)
        engine = build_engine(TrainSpec.of(config, ds_config, ctx))
        held_out = open_held_out_data(config, ctx.data)
        assert held_out is not None

        def slowly() -> Iterator[Any]:
            for batch in held_out:
                time.sleep(2.5 * PATIENCE / len(held_out))
                yield batch

        with watch(folder, endings) as watching:
            watching.progress("evaluating")
            engine.evaluate(slowly(), num_batches=len(held_out), progress=watching.advance)
    return len(held_out), endings


@pytest.mark.parametrize("stages", [1, 2])
def test_an_evaluation_may_take_longer_than_the_patience(stages, tmp_path):
    write_data(tmp_path)
    config = tiny_run(
        tmp_path,
        training__batch_size=1,
        parallel__pipeline=stages,
        data__sequence_length=16,
    )
    for num_batches, endings in run_ranks(
        slow_evaluation, stages, config, tmp_path / "run", init=False
    ):
        assert num_batches >= 10
        assert endings == []


def parts_of_a_run(config: RunConfig) -> list[tuple[str, str]]:
    """Train; every part that was reported, with the activity that it is of."""
    parts: list[tuple[str, str]] = []
    advance = Watchdog.advance

    def note(self: Watchdog, part: str) -> None:
        parts.append((self._own.activity, part))
        advance(self, part)

    Watchdog.advance = note
    assert run_training(config) == EXIT_COMPLETED
    return parts


def test_long_activities_of_a_run_are_reported_in_parts(tmp_path):
    write_data(tmp_path)
    config = tiny_run(tmp_path, training__max_steps=2)
    [first] = run_ranks(parts_of_a_run, 1, config, init=False)
    [second] = run_ranks(parts_of_a_run, 1, tiny_run(tmp_path, training__max_steps=4), init=False)

    def of(parts: list[tuple[str, str]], activity: str) -> list[str]:
        return [part for name, part in parts if name == activity]

    layers = ["embedding", *(f"block_{i}" for i in range(4)), "head"]
    built = [*(f"after {name}" for name in layers), "DeepSpeed's part"]
    assert of(first, "building the model") == of(second, "building the model") == built
    batches = of(first, "evaluating after step 2")
    assert batches == [f"batch {i} of {len(batches)}" for i in range(1, len(batches) + 1)]
    assert len(batches) > 1
    files = ["optimizer/rank_00000.safetensors", "weights/pp_00_tp_00.safetensors"]
    files += ["rng/rank_00000.safetensors", "trainer.json"]
    written = [f"writing {what}" for what in ("optimizer", "weights", "state")]
    assert of(first, "saving step 2") == [*written, *(f"reading back {name}" for name in files)]
    found = of(second, "searching for a checkpoint")
    assert found == [f"step_2/{name}" for name in sorted([*files, "index.json"])]
    assert of(second, "restoring step 2") == ["rank_00000.safetensors"]


def judge_together(folder: Path, *, dead_judge: bool) -> tuple[int, list[Ending]]:
    """All ranks stand still; how often this one read what all ranks had reported."""
    endings: list[Ending] = []
    reads, read = [], RunRecord.read

    def counting(self: RunRecord, ranks: range | None = None) -> dict[int, Progress]:
        if ranks is None:
            reads.append(ranks)
        return read(self, ranks)

    RunRecord.read = counting
    with watch(folder, endings) as watching:
        if dead_judge:
            watchdog._JUDGING_SECONDS, watchdog._OBSERVATION_SECONDS = 3.0, 0.2
            RunRecord(distributed_c10d._get_default_store(), rank=0, size=4).set_flag_once(
                "judge_0", "a rank that is gone"
            )
        watching.progress("step 1")
        end = time.monotonic() + 20
        while not endings and time.monotonic() < end:
            time.sleep(0.1)
    return len(reads), endings


@pytest.mark.parametrize("dead_judge", [False, True])
def test_one_rank_judges_for_all(dead_judge, tmp_path):
    reads, endings = zip(
        *run_ranks(judge_together, 4, tmp_path, dead_judge=dead_judge), strict=True
    )
    assert sorted(reads) == [0, 0, 0, 2]
    assert {ending.code for [ending] in endings} == {EXIT_HUNG}
    assert len([ending for [ending] in endings if ending.message is not None]) == 1
