from __future__ import annotations

import logging
from pathlib import Path

import pytest

from data_tools.config import DataConfig
from data_tools.errors import DataError
from data_tools.sampling.curriculum import Curriculum, Position, Stage
from data_tools.sampling.mix import plan_mix
from data_tools.sampling.order_record import (
    ORDER_NAME,
    OrderRecord,
    add_record,
    order_record,
    read_records,
)
from tests.refusals import assert_refused


def _record(after: int, *, seen: int | None = None) -> OrderRecord:
    stages = [Stage(after, {"a": 1.0}, 8, {}, 4), Stage(after + 3, {"a": 1.0}, 8, {}, 6)]
    start = Position(after, after * 4, after * 32)
    curriculum = Curriculum(stages, total_steps=after + 10, start=start)
    return order_record(
        DataConfig(train="a", sequence_length=8),
        curriculum,
        plan_mix(curriculum.mix_schedule(), consumed_samples=start.samples),
        fingerprints={"a": "f"},
        seed=1,
        vocab_size=10,
        seen_step=after if seen is None else seen,
        skipped_steps=[(2, 3)],
    )


def test_a_step_has_the_samples_of_the_curriculum(tmp_path: Path) -> None:
    record = _record(5)
    assert [record.samples_of(step) for step in (6, 8, 9, 10)] == [
        range(20, 24), range(28, 32), range(32, 38), range(38, 44),
    ]  # fmt: skip
    assert [step for step in range(1, 6) if record.skips(step)] == [2, 3]
    assert record.data.train[0].path == str(Path.cwd() / "a")


def test_a_record_supersedes_those_that_begin_later(tmp_path: Path) -> None:
    for after in (0, 5, 9):
        add_record(tmp_path, _record(after))
    assert [each.after_step for each in read_records(tmp_path)] == [0, 5, 9]
    add_record(tmp_path, _record(5, seen=11))  # as after a rollback from step 11
    assert [(each.after_step, each.seen_step) for each in read_records(tmp_path)] == [
        (0, 0), (5, 11),
    ]  # fmt: skip
    assert read_records(tmp_path)[0] == _record(0)
    assert [path.name for path in tmp_path.iterdir()] == [ORDER_NAME]


def test_a_damaged_file_is_named_when_read_and_replaced_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_record(tmp_path, _record(0))
    path = tmp_path / ORDER_NAME
    path.write_bytes(path.read_bytes()[:40])
    with assert_refused(
        "data_order.jsonl:1", value="record", constraint="not", remedy="start", error=DataError
    ):
        read_records(tmp_path)
    with caplog.at_level(logging.WARNING):
        add_record(tmp_path, _record(5))
    assert "earlier steps are no longer recorded" in caplog.text
    assert [each.after_step for each in read_records(tmp_path)] == [5]
