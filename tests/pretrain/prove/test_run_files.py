"""Every run file of configs/ is proven: its parallel run is the run in one process.

Run files whose small runs differ in the sizes of the model, names of files or in accumulation alone
are proven once here, with accumulation, and each by `make soak`.
"""

from __future__ import annotations

import json

import pytest

from pretrain.config import resolved
from pretrain.config.compose import compose_config
from pretrain.files import CONFIGS
from pretrain.prove.command import EXIT_PROVEN, main
from pretrain.prove.small_run import SmallRun, shrink

RUN_FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def features(small: SmallRun) -> str:
    """Everything about a small run but the sizes of its model, its files, and its accumulation."""
    values = resolved(small.config)
    values["model"] = {key: _but_size(value) for key, value in values["model"].items()}
    for source in (*values["data"]["train"], *values["data"]["validation"]):
        del source["path"]
    del values["training"]["gradient_accumulation_steps"]
    del values["training"]["precision"]  # the quick form is in fp32
    for key in ("run_dir", "logging"):
        del values[key]
    return json.dumps([values, small.ds_config_values, small.ranks], sort_keys=True)


def _but_size(value: object) -> object:
    return "size" if isinstance(value, int) and not isinstance(value, bool) else value


def one_of_each() -> list[str]:
    runs = {name: shrink(compose_config(name), None, max_ranks=4) for name in RUN_FILES}
    by_accumulation = sorted(
        runs, key=lambda name: runs[name].config.training.gradient_accumulation_steps
    )
    return sorted({features(runs[name]): name for name in by_accumulation}.values())


ONE_OF_EACH = one_of_each()


def proof(capsys, *arguments: str) -> dict:
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert out, err
    result = json.loads(out)
    failed = [
        (leg["title"], check)
        for leg in result["legs"]
        for check in leg["checks"]
        if not check["passed"]
    ]
    assert (code, failed) == (EXIT_PROVEN, [])
    return result


def test_there_are_run_files():
    assert len(RUN_FILES) > len(ONE_OF_EACH) > 12


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_run_file_is_proven(name, capsys):
    result = proof(capsys, "--config-name", name, "--quick")
    assert len(result["legs"]) == 2
    assert result["legs"][0]["title"] != result["legs"][1]["title"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_file_is_proven_in_full(name, capsys):
    proof(capsys, "--config-name", name)
