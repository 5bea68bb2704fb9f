"""Stages of other mixes and lengths in the loader: exact order, no repeats, any layout, resume."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.config import DataConfig
from data_tools.errors import DataError
from data_tools.loading.builders import build_train_loader
from data_tools.loading.loader import TrainLoader
from data_tools.sampling.curriculum import BatchStep, plan_curriculum
from tests.data_tools.corpora import write_counting_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_STEPS, _PER_STEP, _LONGEST = 9, 8, 16
_FIRST = {"a": 0, "b": 10_000}
_STAGES: list[dict[str, Any]] = [
    {"until_step": 2, "weights": {"a": 1}, "sequence_length": 4},
    {"until_step": 5, "weights": {"a": 1, "b": 3}, "sequence_length": 8},
    {"weights": {"b": 1, "a": 1}},
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_counting_corpus(folder / "a", 1500, first=_FIRST["a"])
    write_counting_corpus(folder / "b", 1500, first=_FIRST["b"])
    return folder


def _loader(
    folder: Path,
    *,
    stages: list[dict[str, Any]] = _STAGES,
    max_epochs: float | None = None,
    max_steps: int = _STEPS,
    state: dict[str, Any] | None = None,
    micro_batch_size: int = 2,
    data_rank: int = 0,
    data_size: int = 1,
    num_workers: int = 1,
) -> TrainLoader:
    train = [{"path": str(folder / name), "max_epochs": max_epochs} for name in "ab"]
    config = DataConfig.model_validate(
        {
            "train": train,
            "sequence_length": _LONGEST,
            "stages": stages,
            "num_workers": num_workers,
        }
    )
    return build_train_loader(
        config,
        sequence_length=_LONGEST,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        seed=3,
        vocab_size=1 << 20,
        curriculum=plan_curriculum(
            config, sequences_per_step=_PER_STEP, max_steps=max_steps, max_tokens=None
        ),
        state=state,
    )


def _rows(loader: TrainLoader, num_batches: int) -> list[list[int]]:
    return [row.tolist() for _ in range(num_batches) for row in next(loader).tokens]


@pytest.fixture(scope="module")
def reference(corpora: Path) -> list[list[int]]:
    with _loader(corpora, micro_batch_size=8, num_workers=0) as loader:
        return _rows(loader, _STEPS)


def test_each_stage_has_its_length_and_its_mix(reference: list[list[int]]) -> None:
    lengths = [len(row) for row in reference]
    assert lengths == [4] * 16 + [8] * 24 + [16] * 32
    from_b = [row[0] >= _FIRST["b"] for row in reference]
    assert sum(from_b[:16]) == 0
    assert sum(from_b[16:40]) == 18
    assert sum(from_b[40:]) == 16


def test_no_token_is_read_twice_over_stages_of_growing_length(reference: list[list[int]]) -> None:
    tokens = [token for row in reference for token in row]
    assert len(set(tokens)) == len(tokens)


def test_lengths_that_shrink_leave_no_gap(corpora: Path) -> None:
    stages = [{"until_step": 2}, {"sequence_length": 4}]
    with _loader(corpora, stages=stages, max_steps=12) as loader:
        rows = _rows(loader, 48)
    tokens = np.array([token for row in rows for token in row])
    assert len(np.unique(tokens)) == len(tokens)
    # Parts of a window follow each other, so whole windows of the longest length come out.
    of_a = tokens[tokens < _FIRST["b"]]
    windows = of_a[: len(of_a) // _LONGEST * _LONGEST].reshape(-1, _LONGEST)
    assert (np.diff(windows, axis=1) == 1).all()


@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(1, 1), (4, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_over_stages_is_the_same_at_every_layout(
    corpora: Path,
    reference: list[list[int]],
    micro_batch_size: int,
    data_size: int,
    num_workers: int,
) -> None:
    loaders = [
        _loader(
            corpora,
            micro_batch_size=micro_batch_size,
            data_rank=rank,
            data_size=data_size,
            num_workers=num_workers,
        )
        for rank in range(data_size)
    ]
    batches = _STEPS * _PER_STEP // micro_batch_size // data_size
    rows = [row for _ in range(batches) for loader in loaders for row in _rows(loader, 1)]
    assert rows == reference
    for loader in loaders:
        loader.close()


def test_resume_after_every_step_of_every_stage_is_exact(
    corpora: Path, reference: list[list[int]]
) -> None:
    state, rows, ledger = None, [], {}
    for step in range(_STEPS):
        size = (1, 2, 4)[step % 3]
        with _loader(corpora, state=state, micro_batch_size=size) as loader:
            rows += _rows(loader, _PER_STEP // size)
            state = json.loads(json.dumps(loader.state_dict()))
            ledger = {name: source["tokens"] for name, source in state["sources"].items()}
    assert rows == reference
    from_b = sum(len(row) for row in reference if row[0] >= _FIRST["b"])
    assert ledger == {"a": sum(map(len, reference)) - from_b, "b": from_b}


def test_resume_in_the_middle_of_a_stage_may_change_what_follows(
    corpora: Path, reference: list[list[int]]
) -> None:
    with _loader(corpora) as loader:
        before = _rows(loader, 3 * 4)
        state = loader.state_dict()
    changed = [*_STAGES[:1], {**_STAGES[1], "until_step": 4}, {"weights": {"a": 1}}]
    with _loader(corpora, stages=changed, state=state) as loader:
        after = _rows(loader, 6 * 4)
    assert before + after[:8] == reference[:32]  # the same stage goes on
    tokens = [token for row in before + after for token in row]
    assert len(set(tokens)) == len(tokens)
    assert {len(row) for row in after[8:]} == {16}


def test_stage_that_would_begin_inside_a_step_is_refused(corpora: Path) -> None:
    with _loader(corpora) as loader:
        _rows(loader, 4)
        state = loader.state_dict()
    config = DataConfig.model_validate(
        {"train": [str(corpora / n) for n in "ab"], "sequence_length": 16, "stages": _STAGES}
    )
    curriculum = plan_curriculum(config, sequences_per_step=6, max_steps=9, max_tokens=None)
    with _refused("sample", value=12, constraint=("6", "8"), remedy="plan"):
        build_train_loader(
            config,
            sequence_length=16,
            micro_batch_size=6,
            data_rank=0,
            data_size=1,
            seed=3,
            vocab_size=1 << 20,
            curriculum=curriculum,
            state=state,
        )


def test_stages_without_the_length_of_the_run_are_refused(corpora: Path) -> None:
    config = DataConfig.model_validate(
        {"train": [str(corpora / n) for n in "ab"], "sequence_length": 16, "stages": _STAGES}
    )
    with _refused("data.stages", value="length", constraint="run", remedy="curriculum"):
        build_train_loader(
            config,
            sequence_length=16,
            micro_batch_size=1,
            data_rank=0,
            data_size=1,
            seed=0,
            vocab_size=1 << 20,
        )


def test_a_missing_source_of_a_later_stage_is_refused_at_the_start(
    corpora: Path, tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"a{suffix}").symlink_to(corpora / f"a{suffix}")
    stages = [{"until_step": 5, "weights": {"a": 1}}, {"weights": {"b": 1}}]
    with _refused("data.train", value=tmp_path / "b.idx", constraint="no such file", remedy="path"):
        _loader(tmp_path, stages=stages)


def test_a_run_that_reads_a_source_too_often_is_refused(corpora: Path) -> None:
    stages = [{"until_step": 1, "weights": {"a": 1}}, {"weights": {"b": 1}}]
    with _refused("source b", value=1.38, constraint="max_epochs 1.3", remedy="max_epochs"):
        _loader(corpora, stages=stages, max_steps=17, max_epochs=1.3)
    with _loader(corpora, stages=stages, max_steps=17, max_epochs=1.4) as loader:
        assert len(_rows(loader, 17 * 4)) == 17 * 8


_RAMP = [BatchStep(100, 4), BatchStep(250, 8)]  # then 16 samples a step
_SIZES = [4, 4, 4, 4, 8, 8, 16, 16]


def _ramped(
    folder: Path, *, state: dict[str, Any] | None = None, steps_done: int = 0, **layout: Any
) -> TrainLoader:
    config = DataConfig.model_validate(
        {
            "train": [str(folder / name) for name in "ab"],
            "sequence_length": 8,
            "stages": [{"until_step": 2, "weights": {"a": 1}}, {"weights": {"a": 1, "b": 1}}],
        }
    )
    limits = {"sequences_per_step": 16, "max_steps": len(_SIZES), "max_tokens": None}
    curriculum = plan_curriculum(config, ramp=_RAMP, **limits)
    if steps_done:
        start = curriculum.position_after(steps_done)
        curriculum = plan_curriculum(config, ramp=_RAMP, start=start, **limits)
    defaults = {"micro_batch_size": 4, "data_rank": 0, "data_size": 1}
    return build_train_loader(
        config, sequence_length=8, seed=3, vocab_size=1 << 20, curriculum=curriculum, state=state,
        **(defaults | layout),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ramped(corpora: Path) -> list[list[int]]:
    with _ramped(corpora) as loader:
        rows = _rows(loader, sum(_SIZES) // 4)
    tokens = [token for row in rows for token in row]
    assert len(set(tokens)) == len(tokens)
    return rows


@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(1, 1), (2, 2), (1, 4)])
def test_a_ramp_reads_the_same_samples_in_the_same_order_at_every_layout(
    corpora: Path, ramped: list[list[int]], micro_batch_size: int, data_size: int
) -> None:
    loaders = [
        _ramped(corpora, micro_batch_size=micro_batch_size, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    rows, consumed = [], []
    for size in _SIZES:
        for _ in range(size // micro_batch_size // data_size):
            rows += [row for loader in loaders for row in _rows(loader, 1)]
        consumed.append({loader.consumed_samples for loader in loaders})
    assert rows == ramped
    assert consumed == [{total} for total in np.cumsum(_SIZES).tolist()]
    for loader in loaders:
        loader.close()


def test_a_ramp_without_stages_changes_no_sample_of_a_run_without_ramp(
    corpora: Path,
) -> None:
    layout = {"sequence_length": 8, "micro_batch_size": 4, "data_rank": 0, "data_size": 1}
    config = DataConfig.model_validate(
        {"train": [str(corpora / name) for name in "ab"], "sequence_length": 8}
    )
    rows = []
    for ramp in ([], _RAMP):
        curriculum = plan_curriculum(
            config, sequences_per_step=16, max_steps=8, max_tokens=None, ramp=ramp
        )
        with build_train_loader(
            config, seed=3, vocab_size=1 << 20, curriculum=curriculum, **layout
        ) as loader:
            rows.append(_rows(loader, 16))
    assert rows[0] == rows[1]


def test_resume_after_every_step_of_a_ramp_is_exact(corpora: Path, ramped: list[list[int]]) -> None:
    state, rows = None, []
    for step, size in enumerate(_SIZES):
        micro_batch_size = (1, 2, 4)[step % 3]
        with _ramped(
            corpora, state=state, steps_done=step, micro_batch_size=micro_batch_size
        ) as loader:
            rows += _rows(loader, size // micro_batch_size)
            if micro_batch_size < (*_SIZES, 16)[step + 1]:
                _rows(loader, 1)  # of a step that is not finished
            state = json.loads(json.dumps(loader.state_dict()))
        assert state["consumed_samples"] == sum(_SIZES[: step + 1])
    assert rows == ramped


def test_steps_that_are_not_whole_micro_batches_are_refused(corpora: Path) -> None:
    with _refused(
        "steps", value=4, constraint=("micro-batches of 8", "1"), remedy="training.batch_size"
    ):
        _ramped(corpora, micro_batch_size=8)
