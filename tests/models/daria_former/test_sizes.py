from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.daria_former.config import DariaFormerConfig

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "daria_former"
PRESETS = {"125m": "small", "350m": "base", "1b3": "large", "7b": "b7", "13b": "b13", "70b": "b70"}


def _config(path: Path) -> DariaFormerConfig:
    return DariaFormerConfig.model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(("size", "preset"), PRESETS.items())
def test_a_size_file_is_the_preset_of_that_size(size, preset):
    assert _config(FOLDER / f"{size}.yaml") == getattr(DariaFormerConfig, preset)()
