"""The import rule of the packages. Every import statement counts, also those inside functions."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_tools", "parallel", "models", "pretrain", "launchers")

# What of ours the files of a package may import beside their own package.
ALLOWED = {
    "data_tools": (),
    "parallel": (),
    "models": ("parallel",),
    "pretrain": ("data_tools", "parallel", "models"),
    "launchers": ("pretrain.config",),
}
# Folders of models/ that all families share.
SHARED = ("common", "evaluation", "gguf", "hf", "standalone")
MAX_FILES = 18  # in a folder that a reader still takes in at a glance
MAX_LINES = 411  # of a file; a longer one is likely to be about two things
# Command lines that need a little more.
EXCEPTIONS = {
    "models/standalone/train_command.py": (
        "data_tools.text_corpus",
        "data_tools.tokenization.tokenizers",
    ),
    "models/prompting.py": ("data_tools.tokenization.tokenizers",),
    "models/convert.py": ("data_tools.tokenization.tokenizers",),
}
# A foreign module and the only files that may import it.
ONLY_IN = {
    "deepspeed.pipe": ("parallel/pipeline.py",),
    "deepspeed.runtime.pipe": ("parallel/pipeline.py",),
    "megatron": ("parallel/megatron.py",),
    "transformer_engine": ("parallel/precision.py", "pretrain/engine/optimizers.py"),
}


class Import(NamedTuple):
    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_in(source: str, file: str) -> Iterator[Import]:
    """Every module that `source` imports; `from a import b` counts as `a.b`.

    Also one that is given to `import_module` by name.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, file)
            yield from (Import(file, node.lineno, f"{base}.{a.name}") for a in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(file, node.lineno, str(node.args[0].value))


def _absolute(node: ast.ImportFrom, file: str) -> str:
    if not node.level:
        return node.module or ""
    parents = Path(file).parts[: -node.level]
    return ".".join((*parents, node.module or "")).rstrip(".")


def violation(found: Import) -> str | None:
    """Why an import breaks the rule; None when it keeps it."""
    package = found.file.split("/")[0]
    target = found.module.split(".")[0]
    if target in PACKAGES and target != package:
        allowed = (*ALLOWED[package], *EXCEPTIONS.get(found.file, ()))
        if not any(_is_in(found.module, name) for name in allowed):
            return f"{found}; {package} may import {', '.join(allowed) or 'none of ours'}"
    if target == "models":
        families = (_family(found.file), _family(found.module.replace(".", "/")))
        if None not in families and families[0] != families[1]:
            return f"{found}; families never import each other"
    for module, files in ONLY_IN.items():
        if _is_in(found.module, module) and found.file not in files:
            return f"{found}; only {', '.join(files)} may"
    return None


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _family(path: str) -> str | None:
    """The family that a path belongs to; None for what families share."""
    parts = path.split("/")
    if parts[0] != "models" or len(parts) < 2 or parts[1] in SHARED:
        return None
    return parts[1] if (ROOT / "models" / parts[1]).is_dir() else None


def _files() -> list[str]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def project_imports() -> list[Import]:
    return [found for file in _files() for found in imports_in((ROOT / file).read_text(), file)]


def test_no_import_breaks_the_rule():
    violations = [text for found in project_imports() if (text := violation(found))]
    assert not violations, "\n".join(violations)


def test_imports_have_no_cycle():
    """Those inside functions included: none of them is there to dodge one."""
    modules = {_module(file): file for file in _files()}
    graph: dict[str, set[str]] = {}
    for found in project_imports():
        target = found.module
        while target and target not in modules:
            target = target.rpartition(".")[0]
        if target and modules[target] != found.file:
            graph.setdefault(found.file, set()).add(modules[target])
    TopologicalSorter(graph).prepare()  # CycleError names the files of one


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_folder_is_a_heap():
    sizes = Counter(file.rpartition("/")[0] for file in _files())
    assert {folder: size for folder, size in sizes.items() if size > MAX_FILES} == {}


def test_no_file_is_longer_than_one_noun_needs():
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in _files()}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_every_exception_is_used():
    found = project_imports()
    for file, modules in EXCEPTIONS.items():
        for module in modules:
            assert any(i.file == file and _is_in(i.module, module) for i in found), file


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("data_tools/a.py", "import parallel.context", "data_tools may import none of ours"),
        ("parallel/a.py", "from models import base", "parallel may import none of ours"),
        ("models/a.py", "def f():\n    from pretrain import config", "models may import parallel"),
        (
            "models/llama/a.py",
            "from data_tools.tokenization.tokenizers import b",
            "models may import parallel",
        ),
        (
            "models/prompting.py",
            "from data_tools.loading.loader import b",
            "may import parallel, data_t",
        ),
        (
            "models/a.py",
            "importlib.import_module('pretrain.run')",
            "models may import parallel",
        ),
        ("launchers/a.py", "import pretrain.engine.engine", "launchers may import pretrain.config"),
        ("launchers/a.py", "from pretrain import config_tools", "may import pretrain.config"),
        ("pretrain/a.py", "from ..models import b\nimport launchers", "pretrain may import"),
        ("pretrain/a.py", "from deepspeed.pipe import b", "only parallel/pipeline.py may"),
        ("pretrain/a.py", "from deepspeed import pipe", "only parallel/pipeline.py may"),
        ("parallel/layers.py", "import megatron.core", "only parallel/megatron.py may"),
        ("parallel/layers.py", "import transformer_engine", "only parallel/precision.py, "),
    ],
)
def test_a_planted_import_is_found(file, source, reason):
    texts = [violation(found) or "" for found in imports_in(source, file)]
    assert any(reason in text for text in texts), texts


def test_a_family_that_imports_another_is_found(monkeypatch, tmp_path):
    for family in ("one", "two", "common"):
        (tmp_path / "models" / family).mkdir(parents=True)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    [relative] = imports_in("from ..two import layers", "models/one/a.py")
    assert relative.module == "models.two.layers"
    assert "families never import each other" in (violation(relative) or "")
    [shared] = imports_in("from models.common import norms", "models/one/a.py")
    assert violation(shared) is None


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pretrain/a.py", "import data_tools, models.registry, parallel.context, deepspeed"),
        ("models/llama/a.py", "from parallel import layers\nfrom models.common import norms"),
        ("models/convert.py", "from data_tools.tokenization.tokenizers import load_tokenizer"),
        ("launchers/a.py", "from pretrain.config import RunConfig"),
        ("parallel/megatron.py", "from megatron.core import parallel_state"),
    ],
)
def test_an_allowed_import_is_not_reported(file, source):
    assert [violation(found) for found in imports_in(source, file) if violation(found)] == []
