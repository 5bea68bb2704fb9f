from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.checkpoint import parameter_table
from models.daria_former.config import DariaFormerConfig
from models.daria_former.counts import num_parameters
from models.daria_former.model import FAMILY

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "daria_former"
# What the names of the files promise, in parameters.
SIZES = {
    "tiny": 180_431,
    "demo": 2_808_089,
    "demo_wide": 2_903_279,
    "125m": 121_524_633,
    "350m": 351_071_341,
    "1b3": 1_328_335_949,
    "7b": 7_807_804_581,
    "13b": 14_022_034_941,
    "70b": 73_321_865_653,
}
PRESETS = {"125m": "small", "350m": "base", "1b3": "large", "7b": "b7", "13b": "b13", "70b": "b70"}


def _config(path: Path) -> DariaFormerConfig:
    return DariaFormerConfig.model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_formula_counts_the_parameters_of_every_configured_size(path):
    config = _config(path)
    counted = sum(info.shape.numel() for info in parameter_table(FAMILY, config).values())
    assert num_parameters(config) == counted == SIZES[path.stem]


@pytest.mark.parametrize(("size", "preset"), PRESETS.items())
def test_a_size_file_is_the_preset_of_that_size(size, preset):
    assert _config(FOLDER / f"{size}.yaml") == getattr(DariaFormerConfig, preset)()
