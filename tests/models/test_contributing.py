"""CONTRIBUTING.md and docs/tutorial.md to the letter: their family joins a copy of the project and
works there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.__main__ import COMMANDS
from tests.faults.mutated_copy import copy_packages

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "data_tools", "docs", "launchers", "models", "parallel", "pretrain", "tests")
# Files of the project in which the guide adds a line, and the line after which.
TABLES = {"models/registry.py": "_FAMILIES = {", "tests/models/families.py": "CASES = {"}
_BLOCK = re.compile(r"^(?:`([^`\n]+)`\n\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: the file that it is of, None for commands, its language and its text."""

    path: str | None
    language: str
    text: str


def _blocks(text: str) -> list[Block]:
    return [Block(path or None, *rest) for path, *rest in _BLOCK.findall(text)]


def guide() -> list[Block]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return _blocks(text.split("\n## Add a model family\n")[1].split("\n## ")[0])


def tutorial() -> list[Block]:
    return _blocks((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))


def tutorial_commands() -> list[list[str]]:
    texts = [block.text for block in tutorial() if block.language == "sh"]
    return [shlex.split(line) for text in texts for line in text.splitlines()]


def commands() -> list[list[str]]:
    [block] = [block for block in guide() if block.path is None]
    return [shlex.split(line) for line in block.text.splitlines()]


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of the project with the files and lines of the guide."""
    copy = tmp_path_factory.mktemp("project")
    copy_packages(PACKAGES, copy)
    for name in ("CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    for path, _, text in (*guide(), *tutorial()):
        if path is None:
            continue
        file = copy / path
        if path in TABLES:
            before, table, after = file.read_text().partition(TABLES[path] + "\n")
            assert table, path
            file.write_text(before + table + text + after)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return copy


def test_a_family_is_four_files_a_size_and_a_line_in_the_registry():
    written = {block.path: block.text for block in guide() if block.path is not None}
    family = {path for path in written if path.startswith("models/scaled/")}
    assert {Path(path).name for path in family} == {
        "config.py", "layers.py", "model.py", "README.md"
    }  # fmt: skip
    assert written.keys() - family == {"configs/model/scaled/demo.yaml", *TABLES}
    for path in TABLES:
        assert len(written[path].splitlines()) == 1, path


def test_the_tutorial_shows_the_layer_of_the_guide_and_adds_a_size() -> None:
    [layers] = [block for block in guide() if block.path == "models/scaled/layers.py"]
    [shown] = [block for block in tutorial() if block.language == "python"]
    assert shown.text in layers.text
    assert [block.path for block in tutorial() if block.path] == ["configs/model/scaled/125m.yaml"]


def test_the_tutorial_names_commands_run_files_and_pages_that_exist() -> None:
    for command in tutorial_commands():
        program, *arguments = command
        assert program in ("manyformer", "python", "deepspeed", "sbatch"), command
        if program == "manyformer":
            assert arguments[0] in COMMANDS, command
        if program in ("deepspeed", "sbatch"):
            [script] = [word for word in arguments if word.endswith((".py", ".slurm"))]
            assert (ROOT / script).is_file()
    for name in ("docs/tutorial.md", "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(link).exists(), (name, link)


def test_the_code_of_the_guide_passes_the_linter(followed):
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check"], ["format", "--check"]):
        run = subprocess.run(
            [*ruff, *command, "models/scaled", *TABLES],
            cwd=followed,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout


def test_the_family_of_the_guide_trains_at_a_layout_and_is_exported(followed):
    """The commands of the guide, the contract test first; see tests/models/contributed.py."""
    [python, dash_m, pytest_name, contract, *selection] = commands()[0]
    assert (python, dash_m, pytest_name) == ("python", "-m", "pytest")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", contract, "tests/models/contributed.py", *selection],
        cwd=followed,
        env={**os.environ, "PYTHONPATH": str(followed), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
