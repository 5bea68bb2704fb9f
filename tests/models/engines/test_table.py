"""The table of models/README.md is the one of outcomes.py."""

from __future__ import annotations

from pathlib import Path

from tests.models.engines.outcomes import markdown


def test_the_table_of_the_readme_is_that_of_the_tests():
    readme = Path(__file__).parents[3] / "models" / "README.md"
    assert markdown() in readme.read_text(encoding="utf-8")
