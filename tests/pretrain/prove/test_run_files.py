"""Every run file of configs/ is proven: its parallel run is the run in one process.

Here as many as it takes for each family to meet every value that a setting has in any of its run
files, but for sizes of the model, names of files and accumulation; each of them by `make soak`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest

from pretrain.config import resolved
from pretrain.config.compose import compose_config
from pretrain.files import CONFIGS
from pretrain.prove.command import EXIT_PROVEN, main
from pretrain.prove.small_run import SmallRun, shrink

RUN_FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def settings(small: SmallRun) -> set[tuple[str, str]]:
    """The family with each setting of a small run, but for sizes, files and accumulation."""
    values = resolved(small.config)
    family = values["model"]["family"]
    values["model"] = {key: _but_size(value) for key, value in values["model"].items()}
    for source in (*values["data"]["train"], *values["data"]["validation"]):
        del source["path"]
    del values["training"]["gradient_accumulation_steps"]
    del values["training"]["precision"]  # the quick form is in fp32
    for key in ("run_dir", "logging"):
        del values[key]
    return {(family, each) for each in _flat([values, small.ds_config_values, small.ranks])}


def _but_size(value: object) -> object:
    return "size" if isinstance(value, int) and not isinstance(value, bool) else value


def _flat(value: object, place: str = "") -> Iterator[str]:
    items: Sequence[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    yield from (each for key, part in items for each in _flat(part, f"{place}.{key}"))
    if not items:
        yield f"{place}={value!r}"


def with_every_setting() -> list[str]:
    """Run files that together have all settings, each time the one with most of those missing."""
    runs = {name: shrink(compose_config(name), None, max_ranks=4) for name in RUN_FILES}
    found = {name: settings(small) for name, small in runs.items()}
    missing, chosen = set().union(*found.values()), []
    while missing:
        chosen.append(max(RUN_FILES, key=lambda name: (len(found[name] & missing), name)))
        missing -= found[chosen[-1]]
    return sorted(chosen)


ORDINARY = with_every_setting()


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
    assert len(RUN_FILES) > len(ORDINARY) >= 12


@pytest.mark.parametrize("name", ORDINARY)
def test_a_run_file_is_proven(name, capsys):
    result = proof(capsys, "--config-name", name, "--quick")
    assert len(result["legs"]) == 2
    assert result["legs"][0]["title"] != result["legs"][1]["title"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_file_is_proven_in_full(name, capsys):
    proof(capsys, "--config-name", name)
