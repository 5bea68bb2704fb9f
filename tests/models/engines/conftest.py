"""Exports that transformers alone would load: the project's own classes are not registered here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import transformers.dynamic_module_utils as dynamic_modules
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.models.engines.exports import Exports
from tests.models.engines.outcomes import FAMILIES


def _taken_out() -> dict[str, object]:
    """Take the modules of remote code out of the process; they know the folder they came from."""
    names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def _own_modules() -> Iterator[None]:
    before = _taken_out()
    yield
    _taken_out()
    sys.modules.update(before)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Iterator[Exports]:
    folder = tmp_path_factory.mktemp("engines")
    found = Exports(folder)
    for family in FAMILIES:
        found.directory(family)  # which registers classes
    with _own_modules(), pytest.MonkeyPatch.context() as patch:
        # transformers adds its folder of modules, which has to be the only one of that name.
        others = [path for path in sys.path if path != dynamic_modules.HF_MODULES_CACHE]
        patch.setattr(sys, "path", others)
        patch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(folder / "modules"))
        for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
            patch.setattr(mapping, "_extra_content", {})
        yield found
