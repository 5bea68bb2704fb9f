"""One self-contained source file from the modules of this project that a model needs.

A model that transformers does not have is exported with its code. That code is not written twice:
the definitions that an entry module reaches, in whatever internal module they are, are written into
one file, with comments and docstrings, in the order of their modules. What belongs to a cluster is
not reached at tensor size 1: an import inside a function becomes an ImportError that says so.

What may be bundled: internal imports of the form `from package.module import name` at the top of a
module, without `as`; names that are unique among everything that is reached.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_INTERNAL = ("models", "parallel")
_NEEDS_PACKAGE = 'raise ImportError("this part of the model needs the manyformer package")'


class _Origin(NamedTuple):
    """Where an imported name is defined."""

    module: str
    name: str


class _Module:
    """The top level of one internal module."""

    def __init__(self, name: str) -> None:
        self.name = name
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"module {name} cannot be found")
        self.source = Path(spec.origin).read_text(encoding="utf-8")
        self.lines = self.source.splitlines()
        self.tree = ast.parse(self.source)

    @cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        """Name -> the statement that defines it, in the order of the file."""
        found: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            for name in _defined_names(node):
                found[name] = node
        return found

    @cached_property
    def internal(self) -> dict[str, _Origin]:
        """Local name -> where it comes from, for names of this project."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and _is_internal(node.module):
                for alias in node.names:
                    if alias.asname is not None:
                        raise ValueError(f"{self.name} imports {alias.name} under another name")
                    found[alias.name] = _Origin(str(node.module), alias.name)
        return found

    @cached_property
    def external(self) -> dict[str, tuple[str, str]]:
        """Local name -> (module or "", what is imported), for names of other packages."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = ("", _spelled(alias))
            elif isinstance(node, ast.ImportFrom) and not _is_internal(node.module):
                for alias in node.names:
                    found[alias.asname or alias.name] = (str(node.module), _spelled(alias))
        return found

    def text(self, node: ast.stmt) -> str:
        """The source of a statement with the comments above it; imports in functions refused."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first > 0 and self.lines[first - 1].startswith("#"):
            first -= 1
        lines = self.lines[first : node.end_lineno]
        for inner in _inner_imports(node):
            start, stop = inner.lineno - 1 - first, (inner.end_lineno or inner.lineno) - first
            lines[start:stop] = [" " * inner.col_offset + _NEEDS_PACKAGE] + [""] * (
                stop - start - 1
            )
        return "\n".join(lines)


def bundle(entry: str, names: Iterable[str], *, header: str) -> str:
    """The source of a module that defines `names` of the internal module `entry`.

    Raises:
        ValueError: two definitions of one name are reached, or an import of another form.
    """
    modules: dict[str, _Module] = {}
    reached: dict[str, set[str]] = {}
    waiting = [_Origin(entry, name) for name in names]
    while waiting:
        origin = waiting.pop()
        module = modules.setdefault(origin.module, _Module(origin.module))
        if origin.name in module.internal:
            waiting.append(module.internal[origin.name])
            continue
        if origin.name not in module.definitions:
            raise ValueError(f"{origin.module} does not define {origin.name}")
        known = reached.setdefault(origin.module, set())
        if origin.name not in known:
            known.add(origin.name)
            waiting += _used(module, module.definitions[origin.name])
    _check_unique(reached)
    imports: set[tuple[str, str]] = set()
    body: list[str] = []
    for name in _in_order(entry, modules, reached):
        module = modules[name]
        nodes = {module.definitions[d].lineno: module.definitions[d] for d in reached[name]}
        for _, node in sorted(nodes.items()):
            body.append(module.text(node))
            imports |= {module.external[n] for n in _names(node) if n in module.external}
    head = [header.rstrip(), "", "from __future__ import annotations", "", *_grouped(imports)]
    return "\n".join(head) + "\n\n" + "\n\n".join(f"{text}\n" for text in body)


def _grouped(imports: set[tuple[str, str]]) -> list[str]:
    """Import statements, one for each module."""
    plain = sorted(f"import {what}" for module, what in imports if not module)
    named: dict[str, list[str]] = {}
    for module, what in sorted(imports):
        if module:
            named.setdefault(module, []).append(what)
    return plain + [f"from {module} import {', '.join(names)}" for module, names in named.items()]


def _used(module: _Module, node: ast.stmt) -> Iterator[_Origin]:
    """The internal definitions that a statement refers to."""
    for name in _names(node):
        if name in module.internal:
            yield module.internal[name]
        elif name in module.definitions:
            yield _Origin(module.name, name)


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _in_order(entry: str, modules: dict[str, _Module], reached: dict[str, set[str]]) -> list[str]:
    """Modules such that each comes after those that it imports."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        for origin in modules[name].internal.values():
            if origin.module in modules and origin.module not in ordered:
                visit(origin.module)
        ordered.append(name)

    visit(entry)
    return [name for name in ordered if name in reached]


def _check_unique(reached: dict[str, set[str]]) -> None:
    owners: dict[str, str] = {}
    for module, names in sorted(reached.items()):
        for name in sorted(names):
            if name in owners:
                raise ValueError(
                    f"both {owners[name]} and {module} define {name}, which go into one file; "
                    "rename one of them"
                )
            owners[name] = module


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _inner_imports(node: ast.stmt) -> list[ast.stmt]:
    """Imports below a statement, the last one first."""
    found: list[ast.stmt] = [
        inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    return sorted(found, key=lambda inner: -inner.lineno)


def _is_internal(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _INTERNAL


def _spelled(alias: ast.alias) -> str:
    return alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
