from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from models import convert, registry
from models.base import ModelFamily
from models.registry import family_names, get_config_class, get_family, model_type_owners
from tests.models.checkpoints import config, write_checkpoint
from tests.refusals import assert_refused


@pytest.mark.parametrize("name", family_names())
def test_every_name_leads_to_a_family_and_its_configuration_class(name):
    family = get_family(name)
    assert isinstance(family, ModelFamily)
    assert family.name == name
    assert family.config_cls is get_config_class(name)


@pytest.mark.parametrize("name", family_names())
def test_every_public_name_of_a_family_can_be_imported(name):
    package = importlib.import_module(get_config_class(name).__module__.rpartition(".")[0])
    for public in getattr(package, "__all__", ()):
        assert hasattr(package, public), public


def test_an_unknown_family_is_refused_with_the_nearest_name():
    with assert_refused("model.family", value="'lama'", constraint="known", remedy="'llama'"):
        get_family("lama")
    with assert_refused(
        "model.family", value="'gpt'", constraint="known", remedy=("agiformer", "llama")
    ):
        get_config_class("gpt")


def test_every_model_type_has_one_owner():
    owners = {model_type: family.name for model_type, family in model_type_owners().items()}
    assert owners.items() >= {"qwen2": "llama", "mistral": "llama", "mod": "mod"}.items()


def test_a_second_family_that_claims_a_model_type_is_refused(monkeypatch, tmp_path):
    """A copy of the names of llama would take over its directories, or be read as llama."""
    write_checkpoint(tmp_path / "step_1", config(), tokenizer=None)
    convert.to_hf(tmp_path / "step_1", tmp_path / "exported")
    copied = SimpleNamespace(FAMILY=replace(get_family("llama"), name="copied"))
    monkeypatch.setitem(sys.modules, "copied.model", copied)
    monkeypatch.setitem(registry._FAMILIES, "copied", registry._Entry("copied", "LlamaConfig"))
    parts = ("model_type", "'llama'", "llama and copied", "hf=custom_code(...)")
    with assert_refused(*parts):
        convert.from_hf(tmp_path / "exported", tmp_path / "imported")
    with assert_refused(*parts):
        convert.to_hf(tmp_path / "step_1", tmp_path / "again")
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "again").exists()


def test_no_family_is_named_in_parallel():
    folder = Path(__file__).parents[2] / "parallel"
    names = re.compile(rf"\b({'|'.join(family_names())}|capacity_gamma)\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(folder)}: {line.strip()}"
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.md")))
        for line in path.read_text(encoding="utf-8").splitlines()
        if names.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import models", ["torch", "transformers", "deepspeed", "megatron", "pydantic"]),
        (
            "from models.registry import get_config_class; get_config_class('llama')",
            ["torch", "transformers", "deepspeed", "megatron"],
        ),
        ("import models.llama.model", ["transformers", "deepspeed", "megatron"]),
        ("import models.generate", ["transformers", "deepspeed", "megatron"]),
    ],
)
def test_importing_models_imports_nothing_heavy(statement, absent):
    program = f"{statement}; import sys; print([m for m in {absent} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
