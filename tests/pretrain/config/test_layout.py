"""Layouts against a brute-force rule, and the one-line errors of those that do not fit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from pretrain.config import parse_config
from pretrain.config.layout import check_layout, valid_tensor_sizes
from pretrain.errors import ConfigError
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused

HEADS, KV_HEADS, FFN, LAYERS, SEQUENCE = 12, 6, 24, 5, 18
_MODEL = {
    "model__hidden_size": 48,
    "model__num_heads": HEADS,
    "model__num_kv_heads": KV_HEADS,
    "model__intermediate_size": FFN,
    "model__num_layers": LAYERS,
    "data__sequence_length": SEQUENCE,
}


def _fits(world: int, tensor: int, pipeline: int, sequence_parallel: bool) -> bool:
    """The rule by counting: ranks are laid out one by one, and every rank needs equal shares."""
    ranks = [
        (d, p, t)
        for d in range(world)
        for p in range(pipeline)
        for t in range(tensor)
        if (d * pipeline + p) * tensor + t < world
    ]
    whole_replicas = all(
        sum(1 for rank in ranks if rank[0] == d) in (0, pipeline * tensor) for d in range(world)
    )
    shares = [HEADS, KV_HEADS, FFN, *([SEQUENCE] if sequence_parallel else [])]
    even = all(len({len(range(t, n, tensor)) for t in range(tensor)}) == 1 for n in shares)
    stages_filled = len({layer * pipeline // LAYERS for layer in range(LAYERS)}) == pipeline
    return whole_replicas and even and stages_filled


def _accepted(world: int, tensor: int, pipeline: int, sequence_parallel: bool) -> bool:
    config = parse_config(
        run_values(
            **_MODEL,
            parallel__tensor=tensor,
            parallel__pipeline=pipeline,
            parallel__sequence_parallel=sequence_parallel,
        )
    )
    try:
        layout = check_layout(config, world)
    except ConfigError:
        return False
    assert layout.tensor * layout.pipeline * layout.data == world
    return True


def test_every_layout_up_to_16_processes_is_judged_as_counting_does() -> None:
    verdicts = set()
    for world, tensor, pipeline in product(range(1, 17), range(1, 17), range(1, 17)):
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            case = (world, tensor, pipeline, sequence_parallel)
            assert _accepted(*case) == _fits(*case), case
            verdicts.add(_fits(*case))
    assert verdicts == {True, False}


def _error(world: int = 1, **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        check_layout(parse_config(run_values(**changes)), world)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_layout_that_does_not_divide_the_world_names_those_that_do() -> None:
    message = _error(world=4, parallel__pipeline=3)
    assert "parallel.pipeline=3 = 3 does not divide the world size 4" in message
    assert "1 x 2, 1 x 4, 2 x 1, 2 x 2, 1 x 1" in message


def test_a_tensor_size_that_does_not_divide_the_heads_names_those_that_do() -> None:
    message = _error(world=4, parallel__tensor=4)
    assert "parallel.tensor=4 does not divide model.num_kv_heads=2" in message
    assert "allows 1, 2" in message


def test_more_stages_than_layers_are_refused() -> None:
    message = _error(world=8, parallel__pipeline=8)
    assert "parallel.pipeline=8 is more than model.num_layers=4" in message
    assert "4 or less" in message


def test_more_tensor_ranks_than_vocabulary_entries_are_refused() -> None:
    assert "model.vocab_size=1" in _error(world=2, parallel__tensor=2, model__vocab_size=1)


def test_sequence_parallelism_needs_a_sequence_that_it_can_split() -> None:
    message = _error(
        world=2, parallel__tensor=2, parallel__sequence_parallel=True, data__sequence_length=127
    )
    assert "data.sequence_length=127" in message
    assert "126, 128" in message


def test_the_parts_of_logits_divide_the_sequence_of_a_rank() -> None:
    message = _error(training__logits_parts=5, data__sequence_length=128)
    assert "training.logits_parts=5 does not divide" in message
    assert "data.sequence_length=128; nearest parts of every length are 4, 8" in message
    message = _error(
        world=2,
        parallel__tensor=2,
        parallel__sequence_parallel=True,
        data__sequence_length=126,
        training__logits_parts=1000,
    )
    assert "data.sequence_length=126 over 2 ranks: 63; nearest" in message
    assert message.endswith("are 63")
    stages = [{"until_step": 5, "sequence_length": 16}, {}]
    message = _error(training__logits_parts=60, data__sequence_length=64, data__stages=stages)
    assert message.endswith("are 16"), "64 has 32, too, but not the stage"


def test_rows_and_those_of_stages_are_whole_units_of_a_family_that_takes_some_tokens_at_once() -> (
    None
):
    """Before torch; the unit times the tensor ranks that share a row."""
    model = {"family": "agiformer", "hidden_size": 32, "intermediate_size": 32, "num_layers": 2}
    changes: dict[str, Any] = {"model": model | {"num_heads": 4, "patch_size": 6}}
    with assert_refused("data.sequence_length", 128, "6", ("126", "132"), error=ConfigError):
        check_layout(parse_config(run_values(**changes)), 1)
    changes |= {"data__sequence_length": 132, "parallel__tensor": 2}
    assert check_layout(parse_config(run_values(**changes)), 2).tensor == 2
    stages: list[dict[str, Any]] = [{"until_step": 5, "sequence_length": 66}, {}]
    check_layout(parse_config(run_values(**changes, data__stages=stages)), 2)
    changes["parallel__sequence_parallel"] = True
    with assert_refused(
        "data.stages.0.sequence_length", 66, ("6", "parallel.tensor=2"), "72", error=ConfigError
    ):
        check_layout(parse_config(run_values(**changes, data__stages=stages)), 2)


def test_sequences_longer_than_the_positions_of_the_model_are_refused() -> None:
    message = _error(data__sequence_length=257)
    assert "data.sequence_length=257" in message
    assert "model.max_position_embeddings=256" in message


def test_valid_tensor_sizes_are_the_common_divisors_of_what_is_split() -> None:
    assert valid_tensor_sizes(parse_config(run_values(**_MODEL))) == [1, 2, 3, 6]


def test_the_data_axis_is_what_the_world_leaves_over() -> None:
    config = parse_config(run_values(parallel__pipeline=2))
    layout = check_layout(config, 8)
    assert layout.data == 4
    assert layout.grid == (1, 2, 4)


def test_a_run_whose_steps_cannot_be_planned_is_refused_with_its_layout() -> None:
    message = _error(
        training__max_tokens=256 * 7, training__max_steps=None, training__warmup_steps=7
    )
    assert "the run has 7 steps, not more than training.warmup_steps" in message
