"""Every run file of configs/ is proven: its parallel run is the run in one process.

Here as many as show every setting that one of them has, and every family at every size of each axis
that it is run at; `make soak` proves each, in full.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest

from pretrain.config import resolved
from pretrain.config.compose import compose_config
from pretrain.files import CONFIGS
from pretrain.prove.command import EXIT_PROVEN, main
from pretrain.prove.small_run import SmallRun, shrink

RUN_FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# `that_show_all` of them; a list, as to find it takes seconds of every process that collects tests.
ORDINARY = [
    "daria_125m",
    "base",
    "agiformer_curriculum",
    "amrpa_70b",
    "dart_125m",
    "llama_125m",
    "agiformer_70b",
    "demo_muon",
    "dart_70b",
    "amrpa_125m",
    "daria_70b",
    "llama_70b",
]


def features(small: SmallRun) -> frozenset[str]:
    """Every setting of a small run, but the sizes of its model, its files, and its accumulation."""
    values = resolved(small.config)
    family = values["model"]["family"]
    model = {key: _but_size(value) for key, value in values.pop("model").items()}
    axes = values.pop("parallel")
    for source in (*values["data"]["train"], *values["data"]["validation"]):
        del source["path"]
    del values["training"]["gradient_accumulation_steps"]
    del values["training"]["precision"]  # the quick form is in fp32
    for key in ("run_dir", "logging"):
        del values[key]
    found = {*_leaves(values), *_leaves(small.ds_config_values, "deepspeed")}
    return frozenset(found | {f"{family}{leaf}" for leaf in (*_leaves(model), *_leaves(axes))})


def _but_size(value: object) -> object:
    return "size" if isinstance(value, int) and not isinstance(value, bool) else value


def _leaves(value: object, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for entry in value:
            yield from _leaves(entry, f"{path}[of {len(value)}]")
    else:
        yield f"{path}={value!r}"


def that_show_all(shown: Mapping[str, frozenset[str]]) -> list[str]:
    """A few of the names that together show what all do: again and again that with most new."""
    left, chosen = set().union(*shown.values()), []
    while left:
        chosen.append(max(sorted(shown), key=lambda name: len(shown[name] & left)))
        left -= shown[chosen[-1]]
    return chosen


def features_of_all() -> dict[str, frozenset[str]]:
    return {n: features(shrink(compose_config(n), None, max_ranks=4)) for n in RUN_FILES}


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


def test_those_that_are_proven_here_show_all_settings():
    assert len(RUN_FILES) > 2 * len(ORDINARY) > 16
    shown = features_of_all()
    assert that_show_all(shown) == ORDINARY, "run files have changed, and with them this list"
    seen = set().union(*(shown[name] for name in ORDINARY))
    assert all(each <= seen for each in shown.values())


@pytest.mark.parametrize("name", ORDINARY)
def test_a_run_file_is_proven(name, capsys):
    result = proof(capsys, "--config-name", name, "--quick")
    assert len(result["legs"]) == 2
    assert result["legs"][0]["title"] != result["legs"][1]["title"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_file_is_proven_in_full(name, capsys):
    proof(capsys, "--config-name", name)
