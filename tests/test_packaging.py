"""The wheel: complete, found from any directory, and not hidden by folders of the user's."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.__main__ import COMMANDS
from pretrain.files import ROOT

FOLDERS = ("configs", "data_tools", "launchers", "models", "parallel", "pretrain")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The commands of manyformer, and the scripts that single families have.
ENTRIES = PROJECT["scripts"] | {name: command.entry for name, command in COMMANDS.items()}
_BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built the way a release is: from the sdist, which is built from the tree."""
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=skip)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    sdist = _build("build_sdist", tree=folder / "tree", output=folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    [tree] = (folder / "sdist").iterdir()
    return _build("build_wheel", tree=tree, output=folder)


def _build(hook: str, *, tree: Path, output: Path) -> Path:
    done = _run([sys.executable, "-c", _BUILD, hook, str(output)], cwd=tree)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with this one; `bin/` has its commands."""
    target = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    done = _run([*pip, "--no-index", "--no-compile", f"--target={target}", str(wheel)], cwd=target)
    assert done.returncode == 0, done.stderr
    return target


def _run(
    command: Sequence[str], *, cwd: Path, path: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """`path`: what PYTHONPATH is; the tree of these tests is not in it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def _hostile_packages(folder: Path, *names: str) -> None:
    """Packages of a user's that happen to have our names, and say so when they are imported."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            f"raise SystemExit('{folder}/{name} imported')\n"
        )


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files


def test_the_demo_runs_from_the_wheel_in_an_empty_directory(
    installed: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    lines = [
        f"def read_{i}(self, size={i}):\n    return self.buffer[{i}:size]\n" for i in range(400)
    ]
    (text / "one.txt").write_text("\n".join(lines))
    home = tmp_path / "empty"
    home.mkdir()

    def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = _run([sys.executable, "-m", module, *arguments], cwd=home, path=[installed])
        assert done.returncode == 0, done.stderr
        return done

    tokenizer = "data/demo/tokenizer.model"
    command(
        "data_tools.train_tokenizer", f"--input={text}", f"--output={tokenizer}", "--vocab-size=320"
    )
    for split in ("train", "validation"):
        command(
            "data_tools.preprocess",
            f"--input={text}",
            f"--output=data/demo/{split}",
            f"--tokenizer={tokenizer}",
            "--workers=1",
        )
    steps = ("training.max_steps=2", "training.warmup_steps=1", "evaluation.max_windows=1")
    small = ("model.vocab_size=320", "model.num_layers=2", "data.sequence_length=64")
    run = command(
        "pretrain.train", "--config-name=demo", "--ds_config=configs/ds/zero1.json", *small, *steps
    )
    assert len(run.stdout.splitlines()) < 25, "a start is said in less than a screen"
    assert "warn" not in run.stderr.lower()
    assert (home / "runs/demo/checkpoints/step_2").is_dir()
    prompt = "def read(self"
    sample = command(
        "models.generate", "--checkpoint=runs/demo", f"--prompt={prompt}", "--max-new-tokens=3"
    )
    assert sample.stdout.startswith(prompt)
    assert sorted(path.name for path in home.iterdir()) == ["data", "runs"]


def test_a_command_is_not_misled_by_folders_where_it_is_started(
    installed: Path, tmp_path: Path
) -> None:
    arguments = ["--config-name", "demo", "model=dtf/tiny", "--print-config"]
    _hostile_packages(tmp_path / "a", "data_tools", "models", "parallel", "launchers", "configs")
    module = _run(
        [sys.executable, "-m", "pretrain.train", *arguments], cwd=tmp_path / "a", path=[installed]
    )
    _hostile_packages(tmp_path / "b", *FOLDERS)
    script = _run(
        [str(installed / "bin/manyformer"), "train", *arguments],
        cwd=tmp_path / "b",
        path=[installed],
    )
    for done in (module, script):
        assert done.returncode == 0, done.stderr
        assert "family: dtf" in done.stdout


def test_a_folder_that_hides_a_package_is_named_with_the_remedy(
    installed: Path, tmp_path: Path
) -> None:
    _hostile_packages(tmp_path, "models")
    path = [tmp_path, installed]
    hidden = (
        f"{tmp_path}/models hides manyformer's package models in {installed}; rename it, or take"
    )
    for command in (
        [sys.executable, "-m", "pretrain.train", "--print-config"],
        [str(installed / "bin/manyformer"), "train", "--print-config"],
    ):
        done = _run(command, cwd=tmp_path.parent, path=path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {hidden}")
        assert done.stderr.count("\n") == 1
    library = _run([sys.executable, "-c", "import pretrain"], cwd=tmp_path, path=[installed])
    assert f"ImportError: {hidden}" in library.stderr.splitlines()[-1]


def test_job_scripts_of_the_wheel_use_its_code(installed: Path, tmp_path: Path) -> None:
    launchers = _run([str(installed / "bin/manyformer"), "files"], cwd=tmp_path, path=[installed])
    assert launchers.stdout == f"{installed}\n"
    shutil.copytree(installed / "launchers", tmp_path / "launchers")
    for folder in (installed, tmp_path):
        versions = [sys.executable, str(folder / "launchers/versions.py")]
        done = _run(versions, cwd=tmp_path, path=[installed])
        revision = f"revision: manyformer {PROJECT['version']}, installed in {installed}\n"
        assert done.stdout.startswith(revision), done.stderr
    local = [str(installed / "launchers/local.sh"), "1", "--config-name", "demo", "--print-run-dir"]
    done = _run(local, cwd=tmp_path, path=[installed])
    assert done.stdout == f"{tmp_path}/runs/demo\n", done.stderr


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_is_a_function_without_arguments(name: str) -> None:
    module, function = ENTRIES[name].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_module_that_is_a_command_has_a_script_or_a_name_of_manyformer() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("data_tools", "models", "pretrain")
        for path in (ROOT / folder).rglob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text()
    }
    assert modules == {entry.partition(":")[0] for entry in ENTRIES.values()}


def test_both_copies_of_the_check_of_siblings_are_the_same() -> None:
    copies = {(ROOT / package / "siblings.py").read_bytes() for package in ("models", "pretrain")}
    assert len(copies) == 1
