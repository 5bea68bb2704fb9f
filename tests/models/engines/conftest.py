"""Exports that transformers alone would load: the project's own classes are not registered here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers.dynamic_module_utils as dynamic_modules
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.models.engines.exports import Exports
from tests.models.engines.outcomes import FAMILIES


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Iterator[Exports]:
    folder = tmp_path_factory.mktemp("engines")
    found = Exports(folder)
    for family in FAMILIES:
        found.directory(family)  # which registers classes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(folder / "modules"))
        for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
            patch.setattr(mapping, "_extra_content", {})
        yield found
