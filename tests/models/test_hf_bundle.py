from __future__ import annotations

import ast
import sys
import textwrap

import pytest

from models.hf_bundle import bundle


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of an internal package `models.bundled`."""
    import models

    folder = tmp_path / "bundled"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "models.bundled", raising=False)

    def write(name: str, source: str) -> None:
        (folder / f"{name}.py").write_text(textwrap.dedent(source))

    return write


def _run(source: str) -> dict:
    names: dict = {}
    exec(compile(source, "bundle", "exec"), names)
    return names


def test_what_is_reached_is_in_the_file_and_nothing_else(package):
    package(
        "low",
        "import math\nimport json\nLIMIT = 3\ndef unused():\n    return json\n"
        "# Why it is there.\ndef area(r):\n    return math.pi * r * LIMIT\n",
    )
    package("high", "from models.bundled.low import area\ndef twice(r):\n    return 2 * area(r)\n")
    source = bundle("models.bundled.high", ["twice"], header="# made")
    assert _run(source)["twice"](1) == pytest.approx(2 * 3 * 3.14159265)
    assert "# Why it is there." in source
    assert "unused" not in source
    assert "json" not in source
    assert "models" not in source


def test_an_import_inside_a_function_says_that_it_needs_the_package(package):
    package("alone", "def f(size):\n    if size > 1:\n        from parallel import megatron\n"
                             "        return megatron\n    return 0\n")  # fmt: skip
    function = _run(bundle("models.bundled.alone", ["f"], header=""))["f"]
    assert function(1) == 0
    with pytest.raises(ImportError, match="needs the manyformer package"):
        function(2)


def test_two_definitions_of_one_name_are_refused(package):
    package("one", "def _help():\n    return 1\ndef one():\n    return _help()\n")
    package("two", "from models.bundled.one import one\ndef _help():\n    return 2\n"
                   "def two():\n    return one() + _help()\n")  # fmt: skip
    with pytest.raises(ValueError, match=r"both models.bundled.one and models.bundled.two .*_help"):
        bundle("models.bundled.two", ["two"], header="")


def test_the_same_source_gives_the_same_file():
    names = ("DariaFormerHFConfig", "DariaFormerForCausalLM")
    first, second = (
        bundle("models.daria_former.hf_modeling", names, header="# x") for _ in range(2)
    )
    assert first == second
    imported = {
        node.module.split(".")[0]
        for node in ast.walk(ast.parse(first))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not imported & {"models", "parallel", "pretrain", "data_tools", "megatron", "deepspeed"}
