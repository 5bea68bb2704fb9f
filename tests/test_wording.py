"""`match=` pins names, values and messages of libraries; our own wording is for assert_refused.
Docstrings begin with a noun phrase or a verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGES = ("data_tools", "models", "parallel", "pretrain")
THREE_WORDS = re.compile(r"\b[a-z]+(?:,? [a-z]+){2,}\b")
# What pydantic, torch and Python say.
LIBRARIES = re.compile(
    r"Input should be[a-z ]*|(greater|less) than or equal to|Extra inputs are not permitted"
    r"|invalid literal for int|out of bounds"
)


def _strings(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


def _names(target: ast.expr) -> list[str]:
    """The names of an assignment, a loop or a parametrized test, in order."""
    if isinstance(target, ast.Constant):
        return [name.strip() for name in str(target.value).split(",")]
    parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    return [
        part.id if isinstance(part, ast.Name) else str(getattr(part, "value", "")) for part in parts
    ]


def _values(name: str, nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """The expressions that a name takes in `nodes`: assigned, looped over or parametrized."""
    for node in nodes:
        if isinstance(node, ast.Assign) and name in _names(node.targets[0]):
            yield node.value
        elif isinstance(node, ast.For):
            yield from _cells(name, _names(node.target), node.iter, nodes)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.parametrize"):
            yield from _cells(name, _names(node.args[0]), node.args[1], nodes)


def _cells(
    name: str, columns: list[str], table: ast.expr, nodes: list[ast.AST]
) -> Iterator[ast.AST]:
    """The column `name` of a table of literals, which may have a name itself."""
    if name not in columns:
        return
    tables = list(_values(table.id, nodes)) if isinstance(table, ast.Name) else [table]
    for row in (row for each in tables for row in getattr(each, "elts", [])):
        cells = row.args if isinstance(row, ast.Call) else getattr(row, "elts", [row])
        yield from [row] if len(columns) == 1 else cells[columns.index(name) :][:1]


def wording(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every `match=` with three words of ours in a row."""
    for function in (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)):
        nodes = [*ast.walk(function), *module.body]
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            for match in (keyword.value for keyword in call.keywords if keyword.arg == "match"):
                names = [node.id for node in ast.walk(match) if isinstance(node, ast.Name)]
                taken = [value for name in names for value in _values(name, nodes)]
                for text in (text for value in [match, *taken] for text in _strings(value)):
                    if THREE_WORDS.search(LIBRARIES.sub("", text)):
                        yield call.lineno, text


def test_no_test_matches_our_wording():
    found = [
        f"{path.relative_to(TESTS)}:{line}: {text!r}"
        for path in sorted(TESTS.rglob("*.py"))
        if "match=" in (source := path.read_text()) and path != Path(__file__)
        for line, text in wording(ast.parse(source))
    ]
    assert found == [], "assert these with tests.refusals.assert_refused, or match names and values"


@pytest.mark.parametrize(
    "body",
    [
        'raises(E, match="rate=2 is too large")',
        'raises(E, match=f"{name} of no known family")',
        'message = "it is too large"\n    raises(E, match=message)',
        'for _, said in [(1, "it is too large")]:\n        raises(E, match=said)',
        "for _, said in TABLE:\n        raises(E, match=escape(said))",
        "raises(E, match=parametrized)",
    ],
)
def test_wording_is_found_wherever_it_stands(body):
    source = f"""
TABLE = [(1, "it is too large")]

@pytest.mark.parametrize(("a", "parametrized"), [(1, "it is too large"), (2, "rate=3")])
def test(a, parametrized):
    {body}
"""
    assert len(set(wording(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "text",
    ["rate=2 .*max_rate=1", "rate\\n  Input should be greater than 0", "rate.*out of bounds"],
)
def test_names_values_and_messages_of_libraries_may_be_matched(text):
    source = f'def test():\n    with pytest.raises(E, match="{text}"):\n        f()\n'
    assert list(wording(ast.parse(source))) == []


NOUN_CLAUSE = re.compile(r"(What|Which|Where|How|Who|Whose|When) ")


def test_no_docstring_begins_with_a_noun_clause():
    """`Heartbeats of ranks` is read, `What ranks know of each other` has to be decoded."""
    found = []
    for path in (p for name in PACKAGES for p in sorted((TESTS.parent / name).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if NOUN_CLAUSE.match(text):
                    found.append(f"{path.relative_to(TESTS.parent)}: {text.splitlines()[0]}")
    assert found == []
