"""Parameters and FLOPs of every configured size."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.agiformer.config import AgiformerConfig
from models.agiformer.counts import forward_flops_per_token, num_parameters
from models.agiformer.model import FAMILY
from models.layer_counts import count_parameters

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "agiformer"
# What the names of the files promise, in parameters, and forward MFLOPs per byte of 1024.
SIZES = {
    "tiny": (490_123, 0.3),
    "demo": (3_352_149, 2.0),
    "demo_wide": (3_547_915, 2.1),
    "125m": (132_280_989, 73.3),
    "350m": (345_235_251, 185.7),
    "760m": (762_630_963, 409.8),
    "1b3": (1_279_203_618, 687.3),
    "2b7": (2_670_394_915, 1414.0),
    "7b": (7_044_968_316, 3707.1),
    "13b": (12_991_536_417, 6779.0),
    "30b": (29_908_247_325, 15433.2),
    "70b": (69_503_790_405, 35503.8),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_formula_counts_the_parameters_of_every_configured_size(path):
    config = AgiformerConfig.model_validate(yaml.safe_load(path.read_text()))
    counted = count_parameters(FAMILY.layer_specs(config))
    assert num_parameters(config) == counted == SIZES[path.stem][0]
    flops = forward_flops_per_token(config, 1024) / 1e6
    assert flops == pytest.approx(SIZES[path.stem][1], abs=0.05)
    # A parameter of the trunk works for a patch of bytes, that of the reasoning block in every
    # step.
    assert flops < 2e-6 * counted


def test_every_promised_size_has_a_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SIZES)
