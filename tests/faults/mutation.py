"""Finds a piece of Python in a function, however it is formatted, and replaces it."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """`old`, which is in the function `place` once, becomes `new`; some of `tests` must then fail.

    `place`: "package.module:Class.method". `old` and `new` are both an expression, or both
    statements (none: ""). The body `...` of an `if` stands for any body, which stays as it is.
    """

    place: str
    old: str
    new: str
    tests: tuple[str, ...]

    def path(self, tree: Path) -> Path:
        """The file of the module in a copy of the project."""
        module, _, _ = self.place.partition(":")
        return tree / (module.replace(".", "/") + ".py")


def mutated(mutant: Mutant, tree: Path) -> str:
    """The source of the mutant's module with the replacement, without comments.

    Raises:
        ValueError: the module has no such function, or the function does not hold `old` once.
    """
    module = ast.parse(mutant.path(tree).read_text())
    function = _function(module, mutant.place)
    old, new = ast.parse(mutant.old).body, ast.parse(mutant.new).body
    if _is_expression(old) and _is_expression(new):
        count = _replace_expression(function, old[0].value, new[0].value)
    else:
        count = _replace_statements(function, old, new)
    if count != 1:
        raise ValueError(f"{mutant.place} holds {count} times instead of once: {mutant.old!r}")
    return ast.unparse(ast.fix_missing_locations(module))


def _function(module: ast.Module, place: str) -> ast.FunctionDef:
    node: ast.AST = module
    for name in place.partition(":")[2].split("."):
        found = [n for n in getattr(node, "body", ()) if getattr(n, "name", None) == name]
        if len(found) != 1:
            raise ValueError(f"{place}: {len(found)} definitions of {name!r} instead of one")
        (node,) = found
    assert isinstance(node, ast.FunctionDef)
    return node


def _is_expression(statements: Sequence[ast.stmt]) -> bool:
    return len(statements) == 1 and isinstance(statements[0], ast.Expr)


def _replace_expression(function: ast.FunctionDef, old: ast.expr, new: ast.expr) -> int:
    wanted, count = ast.dump(old), 0

    class Replacement(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            nonlocal count
            if isinstance(node, ast.expr) and ast.dump(node) == wanted:
                count += 1
                return copy.deepcopy(new)
            return self.generic_visit(node)

    Replacement().visit(function)
    return count


def _replace_statements(
    function: ast.FunctionDef, old: Sequence[ast.stmt], new: Sequence[ast.stmt]
) -> int:
    count = 0
    for node in list(ast.walk(function)):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if not isinstance(block, list):
                continue
            for start in range(len(block) - len(old), -1, -1):
                there = block[start : start + len(old)]
                if all(map(_matches, there, old)):
                    count += 1
                    block[start : start + len(old)] = _filled(new, there) or [ast.Pass()]
    return count


def _matches(node: ast.stmt, pattern: ast.stmt) -> bool:
    if _has_any_body(pattern):
        assert isinstance(pattern, ast.If)
        return isinstance(node, ast.If) and ast.dump(node.test) == ast.dump(pattern.test)
    return ast.dump(node) == ast.dump(pattern)


def _has_any_body(pattern: ast.stmt) -> bool:
    return isinstance(pattern, ast.If) and ast.unparse(pattern.body[0]) == "..."


def _filled(new: Sequence[ast.stmt], there: Sequence[ast.stmt]) -> list[ast.stmt]:
    """The new statements, with the body of what was there in place of `...`."""
    filled = copy.deepcopy(list(new))
    for statement, before in zip(filled, there, strict=False):
        if _has_any_body(statement):
            assert isinstance(statement, ast.If)
            assert isinstance(before, ast.If)
            statement.body, statement.orelse = before.body, before.orelse
    return filled
