"""Calls that execute data as code, found in the syntax of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_tools", "parallel", "models", "pretrain", "launchers")

_UNPICKLING = {"pickle", "_pickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}
_ALWAYS = {
    "builtins.eval": "runs text",
    "builtins.exec": "runs text",
    "os.system": "runs text in a shell",
    "os.popen": "runs text in a shell",
    "subprocess.getoutput": "runs text in a shell",
    "subprocess.getstatusoutput": "runs text in a shell",
    "asyncio.create_subprocess_shell": "runs text in a shell",
    "tempfile.mktemp": "names a file that somebody else can make first",
    "yaml.load": "may make any object; use yaml.safe_load",
    "yaml.load_all": "may make any object; use yaml.safe_load_all",
    "yaml.full_load": "may make any object; use yaml.safe_load",
    "yaml.unsafe_load": "makes any object; use yaml.safe_load",
}
# Callable -> the keyword without which it may unpickle or write outside its folder.
_NEEDS = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "*.extractall": ("filter", "data"),
}
# Methods of any object that unpickle what they are given.
_UNPICKLING_METHODS = (
    *("load_checkpoint", "gather_object", "all_gather_object"),
    *("broadcast_object_list", "scatter_object_list", "recv_object_list"),
)
_FALSE_ALONE = ("shell", "trust_remote_code")


class Finding(NamedTuple):
    """A dangerous call; `rule` is what an exception names."""

    file: str
    line: int
    rule: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule} {self.why}"


def sources() -> list[Path]:
    """Every Python file and shell script of the project, tests aside."""
    folders = [ROOT / package for package in PACKAGES]
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", ".sh", ".slurm")
    )


def findings_in(source: str, file: str) -> list[Finding]:
    """All dangerous calls of a file, in the order of its lines."""
    if not file.endswith(".py"):
        return [
            Finding(file, number, "eval", "runs text")
            for number, line in enumerate(source.splitlines(), start=1)
            if re.search(r"(^|[;&|(`\s])eval\s", line.partition("#")[0])
        ]
    tree = ast.parse(source)
    names = _names(tree)
    found = [each for node in ast.walk(tree) for each in _of_node(node, names)]
    return sorted(Finding(file, line, rule, why) for line, rule, why in found)


def _names(tree: ast.AST) -> dict[str, str]:
    """What the imports of a file bind -> its full name."""
    names = {"eval": "builtins.eval", "exec": "builtins.exec"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _of_node(node: ast.AST, names: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [getattr(node, "module", None), *(alias.name for alias in node.names)]
        for module in modules:
            if str(module).split(".")[0] in _UNPICKLING:
                yield node.lineno, str(module).split(".")[0], "runs what is in the file it reads"
    if isinstance(node, ast.Attribute | ast.Name):
        name = _full_name(node, names)
        if name in _ALWAYS:  # also where it is passed on and not called
            yield node.lineno, name, _ALWAYS[name]
        if re.search(r"(^|\.)yaml\.(\w+\.)?(C?FullLoader|C?UnsafeLoader|C?Loader)$", name):
            yield node.lineno, name, "makes any object"
    if isinstance(node, ast.Call):
        yield from _of_call(node, _full_name(node.func, names))


def _of_call(node: ast.Call, name: str) -> Iterator[tuple[int, str, str]]:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    method = name.rpartition(".")[2]
    for callee, (keyword, value) in _NEEDS.items():
        if callee in (name, f"*.{method}"):
            given = keywords.get(keyword)
            if not (isinstance(given, ast.Constant) and given.value == value):
                yield node.lineno, callee, f"needs {keyword}={value!r}"
    if method in _UNPICKLING_METHODS and name.split(".")[0] not in PACKAGES:
        yield node.lineno, method, "unpickles"
    for keyword in _FALSE_ALONE:
        given = keywords.get(keyword)
        if given is not None and not (isinstance(given, ast.Constant) and given.value is False):
            yield node.lineno, f"{keyword}=", "must be False where it is given"


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"
