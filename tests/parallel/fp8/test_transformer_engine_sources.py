"""Every call of ours to Transformer Engine fits the signatures in its newest sources.

They are read and not imported, which needs CUDA: `make ecosystem` unpacks its wheel into a folder
that is not on the path.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

from parallel import precision
from parallel.fp8 import layers
from tests.missing import cannot_run

pytestmark = pytest.mark.ecosystem
SOURCES = Path(sys.prefix, "sources", "transformer_engine")
PLACES = {
    "autocast": "pytorch/quantization.py",
    "checkpoint": "pytorch/distributed.py",
    "Linear": "pytorch/module/linear.py",
    "is_fp8_available": "pytorch/quantization.py",
    "is_fp8_block_scaling_available": "pytorch/quantization.py",
    "is_mxfp8_available": "pytorch/quantization.py",
    "FusedAdam": "pytorch/optimizers/fused_adam.py",
    "TransformerEngineBaseModule": "pytorch/module/base.py",
}


@pytest.fixture(autouse=True)
def _sources():
    if not SOURCES.is_dir():
        cannot_run(f"no {SOURCES}", needs="ECOSYSTEM")


def _definition(name: str, method: str | None = None) -> ast.FunctionDef:
    tree = ast.parse((SOURCES / PLACES[name]).read_text())
    [found] = [n for n in tree.body if getattr(n, "name", None) == name]
    if isinstance(found, ast.FunctionDef) and method is None:
        return found
    assert isinstance(found, ast.ClassDef)
    [function] = [n for n in found.body if getattr(n, "name", None) == (method or "__init__")]
    assert isinstance(function, ast.FunctionDef)
    return function


def _assert_fits(function: ast.FunctionDef, call: ast.Call, *, bound: bool) -> None:
    """`bound`: the call does not pass `self` itself."""
    given, arguments = len(call.args), function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    places = names[1:] if bound else names
    has_stars = any(isinstance(each, ast.Starred) for each in call.args)
    assert given <= len(places) or arguments.vararg is not None or has_stars, function.name
    allowed = set(places[given:]) | {each.arg for each in arguments.kwonlyargs}
    keywords = {each.arg for each in call.keywords if each.arg is not None}
    if arguments.kwarg is None:
        assert keywords <= allowed, (function.name, keywords - allowed)


def _calls() -> list[tuple[str, ast.Call]]:
    """Calls of `engine.pytorch.X(...)` in the modules that make them."""
    found = []
    for module in (precision, layers):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("engine.pytorch."):
                found.append((ast.unparse(node.func).removeprefix("engine.pytorch."), node))
    return found


def test_calls_fit():
    calls = _calls()
    assert {name for name, _ in calls} == {
        "autocast",
        "checkpoint",
        "Linear.__init__",
        "Linear.forward",
    }
    for name, call in calls:
        owner, _, method = name.partition(".")
        function = _definition(owner, method or None)
        is_class = function.name == "__init__" and not method
        _assert_fits(function, call, bound=is_class)


def test_recipes_can_be_asked_for_and_made_without_arguments():
    for name in ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available"):
        assert "return_reason" in {each.arg for each in _definition(name).args.args}
    tree = ast.parse((SOURCES / "common/recipe/__init__.py").read_text())
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    wanted = ast.walk(ast.parse(inspect.getsource(precision.fp8_recipe)))
    names = {n.attr for n in wanted if isinstance(n, ast.Attribute) and n.attr.endswith("Scaling")}
    assert len(names) == len(precision.FP8_RECIPES)
    for name in names:
        fields = [n for n in classes[name].body if isinstance(n, ast.AnnAssign)]
        assert all(field.value is not None for field in fields), name


def test_the_optimizer_takes_what_it_is_given():
    arguments = _definition("FusedAdam").args
    names = {each.arg for each in (*arguments.args, *arguments.kwonlyargs)}
    assert {"params", "lr", "betas", "eps", "weight_decay", "adam_w_mode"} <= names


def test_the_state_of_delayed_is_where_it_is_packed_from():
    """Both methods that the layer replaces, and the names that it uses in their place."""
    base = "TransformerEngineBaseModule"
    save = ast.unparse(_definition(base, "get_extra_state"))
    load = ast.unparse(_definition(base, "set_extra_state"))
    for direction in ("fwd", "bwd"):
        for field in ("scale", "amax_history"):
            assert f"self.fp8_meta['scaling_{direction}'].{field}" in save
            assert f"self.fp8_meta['scaling_{direction}'].{field}" in load
    assert "self.init_fp8_meta_tensors(self.fp8_meta['recipe'])" in load
    assert "meta['num_gemms'] = num_gemms" in ast.unparse(_definition(base, "init_fp8_metadata"))
