"""The work that a rank has with the others does not grow with their number."""

from __future__ import annotations

import pytest

from tests.distributed import run_ranks
from tests.refusals import assert_refused, error_line
from tests.scale.__main__ import main
from tests.scale.simulation import Layout, narrow, plan_restores, start, start_ranks

LAYOUT = Layout(tensor=2, pipeline=2)


def small(world_size: int):
    config = narrow("llama_350m", LAYOUT, world_size)
    # No vocabulary that needs padding, which is in no file.
    model = config.model.model_copy(update={"num_layers": 4, "vocab_size": 128})
    return config.model_copy(update={"model": model})


@pytest.fixture(scope="module")
def first_stages():
    """By number of ranks, those of the first stage."""
    sizes = (8, 16)
    return {size: start_ranks(small(size), LAYOUT.ranks_of_stage(0, size), size) for size in sizes}


def test_a_simulated_rank_is_the_real_one(first_stages):
    real = run_ranks(start, 8, small(8), init=False)
    for rank, simulated in first_stages[8].items():
        assert simulated == real[rank]
        assert simulated.ranges


def test_a_rank_is_in_as_many_groups_of_a_larger_run(first_stages):
    few, many = (stage[0].groups for stage in first_stages.values())
    assert few.joined.total() == many.joined.total()
    assert many.made.total() <= 2 * few.made.total()
    [rank] = start_ranks(small(512), [511], 512).values()
    # Its block of ranks that agree is one of many, whose first ranks agree in a group of their own.
    assert rank.groups.joined.total() in (few.joined.total(), few.joined.total() + 1)
    assert rank.groups.made.total() <= 512 / 8 * few.made.total()


def test_a_rank_reads_its_own_elements_from_as_many_files_of_a_larger_run(first_stages):
    for stage in first_stages.values():
        restores = plan_restores(stage, tensor=LAYOUT.tensor)
        assert min(each.num_read for each in restores.values()) > 0
        assert all(each.num_read == each.num_owned for each in restores.values())
        assert max(each.num_files for each in restores.values()) <= 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ranks", "64", "100"], ("parallel.tensor", 8, "world size 100", "multiple of 64")),
        (["--layout", "tp3pp8", "--ranks", "24"], ("parallel.tensor", 3, "64", "allows 1, 2, 4")),
        (
            ["--layout", "tp1pp96", "--ranks", "96"],
            ("parallel.pipeline", 96, "num_layers=80", "80 or less"),
        ),
        (["--config-name", "nothing"], ("--config-name", "'nothing'", "run file", "llama_70b")),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_rank(arguments, parts, capsys):
    assert main(arguments) == 2
    with assert_refused(*parts):
        raise ValueError(error_line(capsys).removeprefix("error: ").rstrip("\n"))


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--ranks", "-8"], ["--layout", "tp0pp1"]])
def test_no_ranks_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert arguments[1] in capsys.readouterr().err
