from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from models.hf.code_bundle import CodeFile, bundle, write_files
from models.registry import get_family
from tests.refusals import assert_refused


@pytest.fixture
def files(tmp_path):
    """Writes modules of a package `models` and bundles the last one."""

    def write(*sources: str) -> str:
        (tmp_path / "models").mkdir()
        for i, source in enumerate(sources):
            text = textwrap.dedent(source).lstrip()
            (tmp_path / "models" / f"m{i}.py").write_text(text)
        entry = CodeFile(f"models.m{len(sources) - 1}")
        return bundle({"out.py": entry}, root=tmp_path)["out.py"]

    return write


def _run(source: str) -> dict:
    names: dict = {}
    exec(compile(source, "out.py", "exec"), names)
    return names


def test_what_is_needed_is_in_the_file_with_its_comments_and_nothing_else(files):
    source = files(
        '''
        """Circles."""
        from __future__ import annotations
        import json
        import math as mathematics
        from collections.abc import Iterable
        from typing import TYPE_CHECKING, Any
        if TYPE_CHECKING:
            from models.m1 import twice

        # Why it is there.
        LIMIT: int = 3

        def unused() -> Any:
            return json

        def area(radius: Iterable) -> float:  # of a circle
            """Its area."""
            # Not the circumference.
            return mathematics.pi * radius * LIMIT

        if __name__ == "__main__":
            print(area(1))
        ''',
        """
        from models.m0 import area
        def twice(r):
            return 2 * area(r)
        """,
    )
    assert _run(source)["twice"](1) == pytest.approx(2 * 3 * 3.14159265)
    kept = ("# Circles.", "# Why it is there.", "# of a circle", "# Not the", '"""Its area."""')
    assert all(text in source for text in kept)
    assert not any(text in source for text in ("unused", "json", "import area", "__main__"))


def test_a_module_imported_as_a_whole_is_an_object(files):
    source = files(
        "ONE = 1\ndef two():\n    return 2 * ONE\ndef three():\n    return 3\n",
        "from models import m0\ndef four(m1):\n    return m0.two() + 2 * m0.ONE + m1.real\n",
    )
    assert _run(source)["four"](0) == 4
    assert "three" not in source


def test_a_file_takes_from_those_before_it_what_they_have(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "low.py").write_text("def one():\n    return 1\n\n\nTWO = 2\n")
    (tmp_path / "models" / "mid.py").write_text("from models.low import one\nONE = one()\n")
    (tmp_path / "models" / "top.py").write_text(
        "from models.low import TWO\nfrom models.mid import ONE\n\nTHREE = ONE + TWO\n"
    )
    files = {"first.py": CodeFile("models.mid"), "second.py": CodeFile("models.top")}
    texts = bundle(files, root=tmp_path)
    assert "TWO = 2" in texts["first.py"]
    assert "from .first import ONE, TWO\n" in texts["second.py"]
    assert "def one" not in texts["second.py"]


def test_an_import_inside_a_function_ends_it_with_the_package_that_is_needed(files):
    source = files(
        """
        def f(size):
            import math
            if size > 1:
                # Only here.
                from parallel import megatron

                return megatron.absent(size)
            return math.pi
        def g():
            try:
                import transformer_engine
            except ImportError as error:
                return str(error)
        """
    )
    names = _run(source)
    assert names["f"](1) == pytest.approx(3.14159265)
    with pytest.raises(ImportError, match=r"parallel\.megatron"):
        names["f"](2)
    assert "transformer_engine is not in this file" in names["g"]()
    assert "absent" not in source


@pytest.mark.parametrize(
    ("sources", "parts"),
    [
        (
            ["def _a():\n    pass\ndef b():\n    _a()\n",
             "from models.m0 import b\ndef _a():\n    pass\ndef c():\n    b(), _a()\n"],
            ("_a", "models.m0._a", "models.m1._a", "rename"),
        ),
        (
            ["def field():\n    pass\n",
             "from dataclasses import field\nimport models.m0\nx = field\n"],
            ("models.m1", "models.m0", "import", "`from`"),
        ),
        (
            ["def field():\n    pass\n",
             "from dataclasses import field\ndef b():\n    field()\n",
             "from models.m0 import field\nfrom models.m1 import b\nx = field, b\n"],
            ("field", "models.m0.field", "dataclasses.field", "rename"),
        ),
        (["def hash():\n    pass\nx = hash\n"], ("hash", "models.m0", "builtin", "rename")),
        (["import numpy\nx = numpy\n"], ("out.py", "numpy", "pydantic, torch", "function")),
        (["x = 1\nprint(x)\n"], ("models.m0", "print(x)", "define", "function")),
        (["from .m1 import x\ny = x\n"], ("models.m0", ".m1", "relative", "name")),
        (
            ["x = 1\n", "from models.m0 import x as y\nz = y\n"],
            ("models.m1", "as y", "models.m0", "`from`"),
        ),
        (["x = 1\n", "from models.m0 import y\nz = y\n"], ("models.m0", "y", "define", "import")),
        (["from models.absent import y\nz = y\n"], ("models.absent", "exist", "module", "correct")),
    ],
)  # fmt: skip
def test_what_would_become_another_program_is_refused(sources, parts, files):
    with assert_refused(*parts):
        files(*sources)


FAMILIES = ("agiformer", "amrpa", "daria_former", "dart", "dtf", "mod")


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory) -> tuple[Path, dict[str, CodeFile]]:
    """The directory of a family's files, and what they are made from."""
    code = get_family(request.param).require_hf().code
    folder = tmp_path_factory.mktemp(request.param)
    write_files(code, folder)
    return folder, code


def test_the_files_of_a_family_are_complete_and_the_same_every_time(written):
    folder, code = written
    assert {name: (folder / name).read_text() for name in code} == bundle(code)
    # Names without a definition, imports without a use, a second definition of a name.
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9"]
    found = subprocess.run(
        [*lint, "--output-format", "json", str(folder)], capture_output=True, check=False
    )
    messages = [entry["message"] for entry in json.loads(found.stdout)]
    assert messages == ["Undefined name `transformer_engine`"]  # after an ImportError


def test_transformers_finds_every_package_that_the_files_import(written):
    from transformers.dynamic_module_utils import get_imports

    folder, code = written
    for name in code:
        others = set(get_imports(folder / name)) - set(sys.stdlib_module_names)
        assert others <= {"pydantic", "torch", "transformers"}


def test_importing_the_bundler_imports_no_torch():
    line = "import sys, models.hf.code_bundle; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", line], check=True)
