from __future__ import annotations

import subprocess
import sys

import pytest

from models.base import ModelFamily
from models.registry import family_names, get_config_class, get_family


@pytest.mark.parametrize("name", family_names())
def test_every_name_leads_to_a_family_and_its_configuration_class(name):
    family = get_family(name)
    assert isinstance(family, ModelFamily)
    assert family.name == name
    assert family.config_cls is get_config_class(name)


def test_an_unknown_family_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"model\.family='lama' is not .*; did you mean 'llama'"):
        get_family("lama")
    with pytest.raises(
        ValueError, match=r"model\.family='gpt' is not .*; choose one of daria_former"
    ):
        get_config_class("gpt")


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
