"""Code that serves every family names none: neither a family nor one of the names it adds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.registry import family_names, get_config_class

ROOT = Path(__file__).parents[1]
SHARED = ("data_tools", "parallel", "pretrain")


def _family_words() -> set[str]:
    words = {*family_names(), "daria"}
    for family in family_names():
        aliases = getattr(get_config_class(family), "aliases", {})
        words |= {*aliases.values(), *(name for name in aliases if "_" in name)}
    return words


def _found(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every name and every text that is not a docstring."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = (
            getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        )
        if isinstance(node, ast.Constant) and id(node) not in prose:
            text = node.value
        if isinstance(text, str):
            yield node.lineno, text  # type: ignore[attr-defined]


def _mentions(source: str) -> list[str]:
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(_family_words())})(?![a-z0-9])", re.IGNORECASE)
    return [f"{line}: {text}" for line, text in _found(source) if pattern.search(text)]


def test_shared_code_names_no_family() -> None:
    files = [file for folder in SHARED for file in sorted((ROOT / folder).rglob("*.py"))]
    found = [f"{file}:{each}" for file in files for each in _mentions(file.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    ['help = "model_type=mod|dtf"', "if family == 'llama': pass", "config.capacity_gamma",
     "m_cu_init = 1", "def f(dtf_layers): pass"],
)  # fmt: skip
def test_a_planted_name_is_found(source: str) -> None:
    assert _mentions(source)


def test_prose_and_other_words_are_free() -> None:
    assert not _mentions('"""Such as llama."""\ndef f():\n    """As in dtf."""\n    divmod(1, 2)')
