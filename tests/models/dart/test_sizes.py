"""Parameters and FLOPs of every configured size."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.dart.config import DARTConfig
from models.dart.counts import forward_flops_per_token, num_parameters
from models.dart.model import FAMILY
from models.layer_counts import count_parameters

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "dart"
# What the names of the files promise, in parameters, and forward MFLOPs per token of 1024.
SIZES = {
    "tiny": (219_136, 0.9),
    "demo": (4_101_696, 11.8),
    "demo_wide": (3_676_928, 12.6),
    "125m": (117_429_504, 308.3),
    "350m": (361_368_576, 873.6),
    "1b3": (1_360_271_360, 3093.6),
    "7b": (6_793_375_744, 14953.4),
    "13b": (13_168_573_440, 28810.8),
    "70b": (69_859_500_032, 141980.7),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_formula_counts_the_parameters_of_every_configured_size(path):
    config = DARTConfig.model_validate(yaml.safe_load(path.read_text()))
    counted = count_parameters(FAMILY.layer_specs(config))
    assert num_parameters(config) == counted == SIZES[path.stem][0]
    flops = forward_flops_per_token(config, 1024) / 1e6
    assert flops == pytest.approx(SIZES[path.stem][1], abs=0.05)


def test_every_promised_size_has_a_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SIZES)
