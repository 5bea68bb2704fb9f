"""Only pretrain/engine and a few files of parallel know the internals of DeepSpeed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OWNERS = (
    "pretrain/engine/",
    "parallel/cpu/compat.py",
    "parallel/pipeline.py",  # stages of DeepSpeed's PipelineEngine
    "parallel/sharding.py",  # the shape of a parameter that ZeRO-3 has partitioned
)
# Attributes of DeepSpeed's engines, and those that it hangs on parameters.
_INTERNAL = re.compile(r"_?deepspeed|global_steps|global_samples|micro_steps|ds_(?!config)\w+")


def accesses(source: str) -> Iterator[str]:
    """`line: name` of each such attribute, read, set, or named in getattr, setattr and hasattr."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            name = node.args[1].value
        else:
            continue
        if _INTERNAL.fullmatch(name):
            yield f"{node.lineno}: {name}"


def test_nothing_else_reaches_into_deepspeed() -> None:
    found, owned = [], 0
    for package in ("data_tools", "models", "parallel", "pretrain"):
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            each = [f"{file}:{access}" for access in accesses(path.read_text())]
            if file.startswith(OWNERS):
                owned += len(each)
            else:
                found += each
    assert not found, "\n".join(found)
    assert owned > 20, "the owners are where they are looked for"


@pytest.mark.parametrize(
    "planted",
    [
        "self.engine.deepspeed.step()",
        "engine._deepspeed",
        "engine.global_steps -= 1",
        "hasattr(parameter, 'ds_id')",
        "getattr(parameter, 'ds_tensor', None)",
        "parameter.ds_numel",
    ],
)
def test_a_planted_access_is_found(planted: str) -> None:
    assert len(list(accesses(planted))) == 1


@pytest.mark.parametrize("allowed", ["spec.ds_config", "settings.ds_config", "import deepspeed"])
def test_what_is_ours_is_not_reported(allowed: str) -> None:
    assert not list(accesses(allowed))
