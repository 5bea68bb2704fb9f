"""Every run file of configs/ is proven: its parallel run is the run in one process."""

from __future__ import annotations

import json

import pytest

from pretrain.files import CONFIGS
from pretrain.prove.command import EXIT_PROVEN, main

RUN_FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def proof(capsys, *arguments: str) -> dict:
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert out, err
    result = json.loads(out[out.index("{\n") :])
    failed = [
        (leg["title"], check)
        for leg in result["legs"]
        for check in leg["checks"]
        if not check["passed"]
    ]
    assert (code, failed) == (EXIT_PROVEN, [])
    return result


def test_there_are_run_files():
    assert len(RUN_FILES) > 12


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_file_is_proven(name, capsys):
    result = proof(capsys, "--config-name", name, "--quick")
    assert len(result["legs"]) == 2
    assert result["legs"][0]["title"] != result["legs"][1]["title"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_file_is_proven_in_full(name, capsys):
    proof(capsys, "--config-name", name)
