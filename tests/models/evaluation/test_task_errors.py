"""Errors of tasks on one line, and task files that lm_eval leaves out without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.evaluation.task_errors import broken_file, described
from tests.models.evaluation.local_tasks import write_tasks
from tests.refusals import assert_refused


def _raised(source: str) -> str:
    try:
        exec(compile(source, "task.py", "exec"), {})
    except Exception as error:
        return described(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{}['dev']", "KeyError: 'dev'"),
        ("raise ValueError('first\\nsecond')", "ValueError: first"),
        ("def ask():\n raise TypeError\nask()", "TypeError in ask of task.py, line 2"),
        ("{}[None]", "KeyError in <module> of task.py, line 1"),
        ("try:\n 1 / 0\nexcept Exception as e:\n raise OSError('x') from e", "ZeroDivisionError: "),
    ],
)
def test_an_error_of_a_task_says_what_or_at_least_where(source: str, expected: str) -> None:
    assert _raised(source).startswith(expected)


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("mine.yaml", "task: mine\n  x: [1,\n", "line 2"),
        ("mine.yaml", "", "NoneType"),
        ("deep/mine.yaml", "- task: mine\n", "list"),
        ("mine.yaml", "include: nowhere.yaml\ntask: mine\n", "nowhere.yaml"),
        ("mine.yml", "task: mine\n", ".yaml"),
    ],
)
def test_a_file_that_lm_eval_leaves_out_is_named_with_the_reason(
    name: str, contents: str, reason: str, tmp_path: Path
) -> None:
    write_tasks(tmp_path)
    assert broken_file(tmp_path) is None
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(contents)
    found = broken_file(tmp_path)
    assert found is not None
    assert found.startswith(f"{path}: ")
    assert reason in found.removeprefix(f"{path}: ")
    assert "\n" not in found


@pytest.mark.ecosystem
def test_a_name_that_no_task_has_leads_to_the_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.evaluation import harness

    manager = harness.TaskManager

    def of_the_folder(include_path: Path, **_: object) -> object:  # not of 14,000 others
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", of_the_folder)
    source = json.loads((write_tasks(tmp_path) / "local_text.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(json.dumps(source | {"task": "mine"}) + "]")
    with assert_refused("--tasks", "mine", ("--include-path", "mine.yaml"), "repair"):
        harness.load_tasks(["mine"], include_path=tmp_path)
