from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from data_tools.config import DataConfig
from data_tools.errors import DataError
from data_tools.sampling.curriculum import START, BatchStep, Curriculum, Position, plan_curriculum
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def _config(*stages: dict[str, Any]) -> DataConfig:
    return DataConfig.model_validate(
        {"train": ["dictionary", "stories", "wiki"], "sequence_length": 64, "stages": stages}
    )


def _plan(
    *stages: dict[str, Any], max_steps: int | None = None, max_tokens: int | None = None
) -> Curriculum:
    return plan_curriculum(
        _config(*stages), sequences_per_step=10, max_steps=max_steps, max_tokens=max_tokens
    )


def _firsts(curriculum: Curriculum) -> list[int]:
    return [stage.first_step for stage in curriculum.stages]


def test_a_run_without_stages_has_one_stage_of_its_whole_length() -> None:
    curriculum = _plan(max_steps=7)
    assert curriculum.total_steps == 7
    assert curriculum.stage_after(6).weights == {"dictionary": 1.0, "stories": 1.0, "wiki": 1.0}
    assert curriculum.tokens_after(7) == 7 * 640


@pytest.mark.parametrize(
    ("max_steps", "max_tokens", "total"),
    [(20, None, 20), (None, 20 * 640, 20), (None, 20 * 640 - 1, 20), (20, 640, 1), (3, 64_000, 3)],
)
def test_the_shorter_limit_ends_a_run(
    max_steps: int | None, max_tokens: int | None, total: int
) -> None:
    assert _plan(max_steps=max_steps, max_tokens=max_tokens).total_steps == total


def test_stages_end_after_the_steps_they_name() -> None:
    curriculum = _plan(
        {"until_step": 3, "weights": {"dictionary": 1}, "sequence_length": 16},
        {"until_step": 8, "weights": {"stories": 1}},
        {"weights": {"wiki": 3, "stories": 1}},
        max_steps=20,
    )
    assert _firsts(curriculum) == [0, 3, 8]
    names = [next(iter(curriculum.stage_after(step).weights)) for step in range(20)]
    assert names == ["dictionary"] * 3 + ["stories"] * 5 + ["wiki"] * 12
    assert [curriculum.end_after(steps) for steps in (0, 2, 3, 19)] == [3, 3, 8, 20]
    assert [curriculum.tokens_after(steps) for steps in (0, 1, 3, 4, 20)] == [
        0, 160, 480, 1120, 480 + 17 * 640,
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [(64, 64, 64), (16, 32, 64), (64, 16, 32)])
@pytest.mark.parametrize("limit", ["max_steps", "max_tokens"])
def test_fractions_are_shares_of_the_tokens_at_any_length(
    lengths: tuple[int, int, int], limit: str
) -> None:
    ends: list[dict[str, Any]] = [{"until_fraction": 0.15}, {"until_fraction": 0.4}, {}]
    stages = [{**end, "sequence_length": n} for end, n in zip(ends, lengths, strict=True)]
    given = 3000 if limit == "max_steps" else 3000 * 640
    curriculum = _plan(*stages, **{limit: given})
    total = curriculum.tokens_after(curriculum.total_steps)
    step = 640 / total
    assert curriculum.tokens_after(_firsts(curriculum)[1]) / total == pytest.approx(0.15, abs=step)
    assert curriculum.tokens_after(_firsts(curriculum)[2]) / total == pytest.approx(0.4, abs=step)
    if limit == "max_steps":
        assert curriculum.total_steps == 3000
    else:
        last = curriculum.total_steps
        assert curriculum.tokens_after(last - 1) < given <= curriculum.tokens_after(last)


def test_max_tokens_counts_the_shorter_sequences_of_earlier_stages() -> None:
    stages = ({"until_step": 3, "sequence_length": 16}, {})
    curriculum = _plan(*stages, max_tokens=480 + 1000)
    assert curriculum.total_steps == 5
    assert curriculum.tokens_after(4) < 1480 <= curriculum.tokens_after(5)


@pytest.mark.parametrize("limits", [{"max_steps": 8}, {"max_steps": 5}, {"max_tokens": 640}])
def test_a_stage_that_gets_no_step_is_refused(limits: dict[str, int]) -> None:
    with _refused("data.stages.1", value=8, constraint="begin", remedy=("longer", "stages")):
        _plan({"until_step": 8, "sequence_length": 32}, {}, **limits)
    with _refused("data.stages.0", value=0, constraint="begin", remedy=("longer", "stages")):
        _plan({"until_fraction": 0.001, "sequence_length": 32}, {}, max_steps=10)


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ([{}], ("data.stages", "one", "no effect", ("data.train", "data.sequence_length"))),
        ([{}, {}], ("data.stages.0", "until_step", "until_fraction", "correct")),
        (
            [{"until_step": 1, "until_fraction": 0.5}, {}],
            ("data.stages.0", "until_step", "until_fraction", "correct"),
        ),
        (
            [{"until_step": 1}, {"until_fraction": 0.5}, {}],
            ("data.stages.0", "until_step", "until_fraction", "correct"),
        ),
        (
            [{"until_step": 1}, {"until_step": 2}],
            ("data.stages.1", "last", "run", "until_step"),
        ),
        (
            [{"until_step": 2}, {"until_step": 2}, {}],
            ("data.stages.1", 2, ("after", "end 2"), "order"),
        ),
        (
            [{"until_step": 1, "weights": {"poems": 1}}, {}],
            ("data.stages.0.weights", "poems", ("data.train", "wiki"), "add"),
        ),
        (
            [{"until_step": 1, "weights": {"wiki": 1}}, {"weights": {"stories": 1}}],
            ("data.train", "dictionary", "stage", ("data.stages", "remove")),
        ),
        (
            [{"until_step": 1, "sequence_length": 48}, {}],
            ("data.stages.0.sequence_length", 48, "data.sequence_length=64", "change"),
        ),
        (
            [{"until_step": 1, "sequence_length": 128}, {}],
            ("data.stages.0.sequence_length", 128, "data.sequence_length=64", "change"),
        ),
    ],
)
def test_wrong_stages_are_refused(stages: list[dict[str, Any]], parts: tuple) -> None:
    with assert_refused(*parts):
        _config(*stages)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"until_fraction": 1.5}, {}], "less than 1"),
        ([{"until_step": 1, "weights": {}}, {}], "at least 1 item"),
        ([{"until_step": 1, "weights": {"wiki": 0}}, {}], "greater than 0"),
        ([{"until_step": 1, "lenght": 8}, {}], "Extra inputs are not permitted"),
    ],
)
def test_stage_with_a_wrong_value_is_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(*stages)


def test_a_weight_that_every_stage_overrides_is_refused() -> None:
    section = {
        "train": [{"path": "wiki", "weight": 2}],
        "sequence_length": 8,
        "stages": [
            {"until_step": 1, "weights": {"wiki": 1}, "sequence_length": 4},
            {"weights": {"wiki": 1}},
        ],
    }
    with assert_refused(
        "source wiki", value="2.0", constraint=("weight", "stage"), remedy="remove"
    ):
        DataConfig.model_validate(section)


RAMP = [BatchStep(1000, 2), BatchStep(4000, 5)]  # sequences of 64: steps of 128 and 320 tokens


def _ramped(
    *stages: dict[str, Any],
    max_steps: int | None = None,
    max_tokens: int | None = None,
    ramp: Sequence[BatchStep] = RAMP,
    start: Position = START,
    sequences_per_step: int = 10,
) -> Curriculum:
    return plan_curriculum(
        _config(*stages),
        sequences_per_step=sequences_per_step,
        max_steps=max_steps,
        max_tokens=max_tokens,
        ramp=ramp,
        start=start,
    )


def _walk(curriculum: Curriculum) -> list[tuple[int, int, int]]:
    """Sequences, their length and the tokens after each step, one step at a time."""
    steps = range(curriculum.start.steps, curriculum.total_steps)
    stages = [curriculum.stage_after(step) for step in steps]
    return [
        (stage.sequences_per_step, stage.sequence_length, curriculum.tokens_after(step + 1))
        for step, stage in zip(steps, stages, strict=True)
    ]


def test_a_batch_grows_with_the_step_that_reaches_the_tokens() -> None:
    sizes, tokens, expected = [], 0, []
    while tokens < 9000:  # the definition, step by step
        size = 2 if tokens < 1000 else 5 if tokens < 4000 else 10
        tokens += size * 64
        sizes.append(size)
        expected.append((size, 64, tokens))
    assert len(set(sizes)) == 3
    curriculum = _ramped(max_tokens=9000)
    assert _walk(curriculum) == expected
    assert curriculum.position_after(len(sizes)) == (len(sizes), sum(sizes), tokens)
    assert _walk(_ramped(max_steps=12)) == expected[:12]


def test_a_ramp_and_stages_change_independently() -> None:
    curriculum = _ramped(
        {"until_step": 3, "sequence_length": 16}, {"until_step": 12}, {"sequence_length": 32},
        max_steps=20,
    )  # fmt: skip
    tokens = 0
    for step, (size, length, after) in enumerate(_walk(curriculum)):
        assert size == (2 if tokens < 1000 else 5 if tokens < 4000 else 10)
        assert length == (16 if step < 3 else 64 if step < 12 else 32)
        tokens += size * length
        assert after == tokens
    assert curriculum.describe().count("\n") + 1 == len(curriculum.stages) >= 4


def test_a_resumed_run_describes_the_steps_that_are_left() -> None:
    curriculum = _ramped({"until_step": 3, "sequence_length": 16}, {}, max_steps=20, ramp=[])
    everything = curriculum.describe().splitlines()
    assert [line.partition(":")[0] for line in everything] == ["steps 1 to 3", "steps 4 to 20"]
    assert curriculum.describe(after=3).splitlines() == everything[1:]
    [left] = curriculum.describe(after=12).splitlines()
    assert left == everything[1].replace("steps 4 to 20", "steps 13 to 20")


def test_a_ramp_level_passed_by_the_previous_step_is_skipped() -> None:
    steep = [BatchStep(100, 8), BatchStep(110, 9)]
    assert [size for size, *_ in _walk(_ramped(max_steps=3, ramp=steep))] == [8, 10, 10]


STAGED = (
    {"until_fraction": 0.2, "sequence_length": 16}, {"until_fraction": 0.7}, {"sequence_length": 32}
)  # fmt: skip
BY_STEP = ({"until_step": 4, "sequence_length": 16}, {"until_step": 9}, {"sequence_length": 32})


@pytest.mark.parametrize(
    ("stages", "limits", "ramp"),
    [
        ((), {"max_steps": 30}, RAMP),
        ((), {"max_tokens": 9000}, RAMP),
        (STAGED, {"max_tokens": 9000}, RAMP),
        (STAGED, {"max_steps": 30}, []),
        (BY_STEP, {"max_steps": 30}, RAMP),
        (BY_STEP, {"max_tokens": 9000}, []),
    ],
)
def test_a_plan_from_any_step_is_the_rest_of_the_whole_plan(
    stages: Sequence[dict[str, Any]], limits: dict[str, int], ramp: list[BatchStep]
) -> None:
    whole = _ramped(*stages, **limits, ramp=ramp)
    for step in range(whole.total_steps + 1):
        rest = _ramped(*stages, **limits, ramp=ramp, start=whole.position_after(step))
        assert rest.total_steps == whole.total_steps
        assert _walk(rest) == _walk(whole)[step:]
        schedule = {(p.first_sample, p.sequence_length) for p in whole.mix_schedule()}
        assert {(p.first_sample, p.sequence_length) for p in rest.mix_schedule()[1:]} <= schedule


def test_consumed_tokens_count_when_the_batch_size_changes() -> None:
    start = _ramped(max_steps=6, ramp=[]).position_after(6)
    assert start == (6, 60, 3840)
    later = _ramped(max_tokens=9000, ramp=[], start=start, sequences_per_step=40)
    assert _walk(later) == [(40, 64, 3840 + 2560), (40, 64, 3840 + 5120), (40, 64, 3840 + 7680)]
    assert later.position_after(9) == (9, 180, 11_520)


@pytest.mark.parametrize(
    ("limits", "total"),
    [({"max_steps": 6}, 6), ({"max_steps": 4}, 4), ({"max_tokens": 3840}, 6),
     ({"max_tokens": 3201}, 6), ({"max_tokens": 3200}, 5), ({"max_tokens": 1}, 1)],
)  # fmt: skip
def test_a_finished_run_plans_no_further_step(limits: dict[str, int], total: int) -> None:
    start = Position(6, 60, 3840)
    assert _ramped(**limits, ramp=[], start=start).total_steps == total


def test_shares_of_tokens_that_cannot_be_converted_to_steps_are_refused() -> None:
    refused = partial(
        _refused,
        "training.max_steps",
        value=30,
        constraint=("until_fraction", "training.batch_ramp"),
        remedy=("training.max_tokens", "until_step"),
    )
    with refused():
        _ramped(*STAGED, max_steps=30)
    with refused():
        _ramped(*STAGED, max_steps=30, max_tokens=9000)


def test_samples_are_rounded_down_to_whole_steps_of_their_size() -> None:
    curriculum = _ramped(max_steps=20)
    begins = [curriculum.position_after(step).samples for step in range(21)]
    for samples in range(begins[-1]):
        expected = max(begin for begin in begins if begin <= samples)
        assert curriculum.samples_in_whole_steps(0, samples) == expected
