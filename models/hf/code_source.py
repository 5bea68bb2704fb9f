"""Parsed source of the project's modules: relocatable statements, and the origin of global names.

Imports inside functions are for features that a single process does not need (collectives of tensor
ranks, FP8). They are replaced by an ImportError, since transformers refuses a file that imports,
even inside a function, a package that is not installed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

PROJECT = "manyformer"
PACKAGES = ("models", "parallel")
# Packages that a generated file may import beside the standard library.
REQUIREMENTS = ("pydantic", "torch", "transformers")
LINE_LENGTH = 100


class Origin(NamedTuple):
    """The origin of a global name: `name` of `module`, or the module itself if `name` is empty."""

    module: str
    name: str = ""

    @property
    def is_project(self) -> bool:
        return self.module.split(".")[0] in PACKAGES


class Statement(NamedTuple):
    """A top-level statement of a module: the names it defines, its syntax tree, its lines with the
    comments above, and whether a blank line precedes them."""

    names: tuple[str, ...]
    node: ast.stmt
    text: str
    is_apart: bool


@dataclass
class Module:
    """A parsed module of the project; `scope` maps its global names to their origins."""

    name: str
    docstring: str
    statements: list[Statement] = field(default_factory=list)
    scope: dict[str, Origin] = field(default_factory=dict)

    def kept(self, needed: set[Origin]) -> list[Statement]:
        """The statements that define one of the needed names.

        Raises:
            ValueError: the module does something else when it is imported, which would be lost.
        """
        kept = [s for s in self.statements if any(Origin(self.name, n) in needed for n in s.names)]
        other = next((s for s in self.statements if not s.names), None)
        if kept and other is not None:
            raise ValueError(
                f"{self.name}: {ast.unparse(other.node).splitlines()[0]!r} would run when the file "
                "is imported, and its modules may only import and define; move it into a function"
            )
        return kept


def read_module(name: str, root: Path, *, text: str | None = None) -> Module:
    """Parse the module `name` below `root`, or its given text, without running it.

    Raises:
        ValueError: it does not exist, or imports from the project in an unsupported way.
    """
    if text is None:
        path = _path(name, root)
        if path is None:
            raise ValueError(f"module {name} does not exist below {root}; correct the import")
        text = path.read_text(encoding="utf-8")
    tree, lines = _parsed(text)
    module = Module(name, ast.get_docstring(tree) or "")
    end = 0
    for node in tree.body:
        part = "\n".join(lines[end : node.end_lineno])
        end = node.end_lineno or end
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.scope |= _imported(node, name, root)
        elif not _is_idle(node):
            names = _names(node)
            module.statements.append(
                Statement(names, node, part.lstrip("\n"), part.startswith("\n"))
            )
            module.scope |= {defined: Origin(name, defined) for defined in names}
    return module


@cache  # every export reads the same few dozen modules
def _parsed(text: str) -> tuple[ast.Module, list[str]]:
    source = _without_inner_imports(text)
    return ast.parse(source), source.splitlines()


def _path(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _is_idle(node: ast.stmt) -> bool:
    """Whether a statement does nothing when its module is imported."""
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        return test.endswith("TYPE_CHECKING") or test == "__name__ == '__main__'"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _names(node: ast.stmt) -> tuple[str, ...]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return (node.name,)
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        parts = [part for target in targets for part in ast.walk(target)]
        return tuple(part.id for part in parts if isinstance(part, ast.Name))
    return ()


def _imported(node: ast.Import | ast.ImportFrom, module: str, root: Path) -> dict[str, Origin]:
    """The global names that an import binds."""
    where = f"{module}: {ast.unparse(node)!r}"
    found = {}
    for alias in node.names:
        if isinstance(node, ast.Import):
            origin, bound = Origin(alias.name), alias.name.split(".")[0]
        elif node.level or node.module is None:
            raise ValueError(f"{where}: relative imports are not followed; name the module in full")
        else:
            origin, bound = Origin(node.module, alias.name), alias.name
            if origin.is_project and _path(f"{node.module}.{alias.name}", root):
                origin = Origin(f"{node.module}.{alias.name}")
        if origin.module == "__future__":
            continue
        if origin.is_project and (
            isinstance(node, ast.Import) or alias.asname not in (None, bound)
        ):
            raise ValueError(f"{where}: import it with `from`, under its own name")
        found[alias.asname or bound] = origin
    return found


# Imports inside functions.


def _without_inner_imports(source: str) -> str:
    """Replace imports that a generated file cannot resolve, and the rest of their block, by an
    ImportError."""
    lines = source.splitlines()
    edits = [edit for node in ast.parse(source).body for edit in _edits(node)]
    for first, last, text in sorted(edits, reverse=True):
        lines[first - 1 : last] = [text]
    return "\n".join(lines) + "\n"


def _edits(node: ast.AST) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, replacement) of every block with an unresolvable import."""
    if isinstance(node, ast.stmt) and _is_idle(node):
        return
    for block in _blocks(node):
        for statement in block:
            absent = _absent(statement)
            if absent:
                text = _import_error(absent, statement.col_offset)
                yield statement.lineno, block[-1].end_lineno or 0, text
                break
            yield from _edits(statement)


def _import_error(absent: str, indentation: int) -> str:
    margin = " " * indentation
    message = f'"{absent} is not in this file; install {PROJECT} to use it"'
    line = f"{margin}raise ImportError({message})"
    if len(line) <= LINE_LENGTH:
        return line
    return f"{margin}raise ImportError(\n{margin}    {message}\n{margin})"


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield block
    for handler in getattr(node, "handlers", ()):
        yield handler.body


def _absent(statement: ast.stmt) -> str | None:
    """The import that is not available in a generated file, or None."""
    if isinstance(statement, ast.Import):
        modules = [alias.name for alias in statement.names]
    elif isinstance(statement, ast.ImportFrom):
        modules = [f"{statement.module}.{alias.name}" for alias in statement.names]
    else:
        return None
    return next((name for name in modules if not may_import(name)), None)


def may_import(module: str) -> bool:
    top = module.split(".")[0]
    return top in sys.stdlib_module_names or top in REQUIREMENTS
