"""The command line: one line for what cannot be proven, and nothing left behind."""

from __future__ import annotations

import resource
import tempfile

import pytest

from pretrain.errors import EXIT_USER_ERROR
from pretrain.prove.command import EXIT_DIFFERENT, EXIT_PROVEN, main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a proof makes its folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-name", "nothing"], "nothing"),
        (["model.no_such_feature=true"], "no_such_feature"),
        (["parallel.expert=2"], "no experts"),
        (["--ranks", "2", "parallel.tensor=2", "parallel.pipeline=2"], "--ranks"),
        (["--ds_config", "no.json"], "no.json"),
        (["--ds_config", '{"zero_optimization": {"stage": 4}}'], "stage"),
        (["--unknown"], "--help"),
        (["--ranks", "0"], "positive"),
        (["--timeout", "0"], "positive"),
        (["--full", "parallel.tensor=2", "parallel.pipeline=4"], "--ranks"),
        (["--seed", "1"], "--seed has no effect without --random"),
        (["--random", "2", "--minutes", "0"], "above 0"),
        (["--random", "2", "--minutes", "nan"], "above 0"),
        (["--random", "2", "--minutes", "soon"], "above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(arguments, message, folder, capsys):
    base = [] if "--config-name" in arguments else ["--config-name", "demo"]
    assert main([*base, *arguments, "--quick"]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1, err
    assert not list(folder.glob("prove-*"))


def test_a_checkpoint_that_cannot_be_written_is_one_line(folder, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = main(["--config-name", "demo", "model=llama/demo", "--quick", "--ranks", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert code == EXIT_DIFFERENT
    lines = [line for line in err.splitlines() if line.startswith(("error", "not proven"))]
    assert len(lines) == 1, err
    assert "rank 0" in lines[0]
    assert not list(folder.glob("prove-*"))


def test_a_run_drawn_at_random_is_proven_and_refusals_are_counted(folder, capsys):
    code = main(["--random", "1", "--seed", "7", "--family", "llama"])
    out = capsys.readouterr().out
    assert code == EXIT_PROVEN, out
    assert "1 runs proven, 0 not" in out
    assert not list(folder.glob("prove-*"))


def test_options_of_a_run_are_refused_beside_a_search(capsys):
    assert main(["--random", "1", "--ranks", "2"]) == EXIT_USER_ERROR
    assert "--ranks has no effect with --random" in capsys.readouterr().err
