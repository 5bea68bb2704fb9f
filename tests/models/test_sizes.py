"""Sizes promised by the names of the files in configs/model.

test_layer_counts.py compares the closed forms with the layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from models.registry import get_config_class, get_family

FOLDER = Path(__file__).parents[2] / "configs" / "model"
PARAMETERS = {
    "agiformer": {
        "tiny": 490_123,
        "demo": 3_352_149,
        "demo_wide": 3_547_915,
        "125m": 132_280_989,
        "350m": 345_235_251,
        "760m": 762_630_963,
        "1b3": 1_279_203_618,
        "2b7": 2_670_394_915,
        "7b": 7_044_968_316,
        "13b": 12_991_536_417,
        "30b": 29_908_247_325,
        "70b": 69_503_790_405,
    },
    "amrpa": {
        "tiny": 191_302,
        "demo": 2_496_454,
        "demo_wide": 4_089_732,
        "125m": 134_895_368,
        "350m": 374_853_640,
        "1b3": 1_348_965_384,
        "7b": 6_745_103_368,
        "13b": 13_024_124_936,
        "70b": 68_989_627_400,
    },
    "daria_former": {
        "tiny": 180_431,
        "demo": 2_808_089,
        "demo_wide": 2_903_279,
        "125m": 121_524_633,
        "350m": 351_071_341,
        "1b3": 1_328_335_949,
        "7b": 7_807_804_581,
        "13b": 14_022_034_941,
        "70b": 73_321_865_653,
    },
    "dart": {
        "tiny": 219_136,
        "demo": 4_101_696,
        "demo_wide": 3_676_928,
        "125m": 117_429_504,
        "350m": 361_368_576,
        "1b3": 1_360_271_360,
        "7b": 6_793_375_744,
        "13b": 13_168_573_440,
        "70b": 69_859_500_032,
    },
    "dtf": {
        "tiny": 218_536,
        "demo": 2_449_448,
        "demo_wide": 3_478_920,
        "125m": 135_913_368,
        "0b5": 498_873_904,
        "1b5": 1_560_277_816,
        "3b": 3_123_770_440,
        "7b": 7_705_644_856,
        "14b": 15_084_883_040,
        "32b": 33_183_675_520,
        "72b": 74_049_118_368,
    },
    "llama": {
        "demo": 2_410_176,
        "demo_wide": 3_015_936,
        "125m": 134_105_856,
        "350m": 373_867_520,
        "1b3": 1_345_423_360,
        "7b": 6_738_415_616,
        "13b": 13_015_864_320,
        "70b": 68_976_648_192,
        "qwen2_0b5": 494_032_768,
        "qwen2_7b": 7_615_616_512,
        "qwen3_0b6": 596_049_920,
        "qwen3_8b": 8_190_735_360,
        "mistral_7b": 7_241_732_096,
        "phi3_mini": 3_821_079_552,
        "olmo2_7b": 7_298_617_344,
        "gemma_2b": 2_506_172_416,
    },
    "mod": {
        "tiny": 214_272,
        "demo": 2_412_096,
        "demo_wide": 3_412_736,
        "125m": 134_138_112,
        "0b5": 494_043_520,
        "1b5": 1_543_735_808,
        "3b": 3_085_975_552,
        "7b": 7_615_666_688,
        "14b": 14_770_156_544,
        "32b": 32_764_040_192,
        "72b": 72_706_531_328,
    },
}
# Forward, per token (agiformer: per byte) of 1,024.
MEGAFLOPS = {
    "agiformer": {
        "tiny": 0.3,
        "demo": 2.0,
        "demo_wide": 2.1,
        "125m": 73.3,
        "350m": 185.7,
        "760m": 409.8,
        "1b3": 687.3,
        "2b7": 1_414.0,
        "7b": 3_707.1,
        "13b": 6_779.0,
        "30b": 15_433.2,
        "70b": 35_503.8,
    },
    "amrpa": {
        "tiny": 1.7,
        "demo": 8.3,
        "demo_wide": 10.4,
        "125m": 277.4,
        "350m": 785.1,
        "1b3": 2_771.7,
        "7b": 13_705.7,
        "13b": 26_401.6,
        "70b": 139_215.5,
    },
    "dart": {
        "tiny": 0.9,
        "demo": 11.8,
        "demo_wide": 12.6,
        "125m": 308.3,
        "350m": 873.6,
        "1b3": 3_093.6,
        "7b": 14_953.4,
        "13b": 28_810.8,
        "70b": 141_980.7,
    },
}


def _config(family: str, size: str) -> Any:
    values = yaml.safe_load((FOLDER / family / f"{size}.yaml").read_text())
    return get_config_class(family).model_validate(values)


@pytest.mark.parametrize(("family", "sizes"), PARAMETERS.items(), ids=list(PARAMETERS))
def test_every_size_has_the_promised_parameters(family: str, sizes: dict[str, int]) -> None:
    assert {path.stem for path in (FOLDER / family).glob("*.yaml")} == sizes.keys()
    found = {size: get_family(family).num_parameters(_config(family, size)) for size in sizes}
    assert found == sizes


@pytest.mark.parametrize(("family", "sizes"), MEGAFLOPS.items(), ids=list(MEGAFLOPS))
def test_every_size_has_the_promised_flops(family: str, sizes: dict[str, float]) -> None:
    for size, megaflops in sizes.items():
        flops = get_family(family).flops(_config(family, size), 1024)
        assert flops / 1e6 == pytest.approx(megaflops, abs=0.05), size


def test_a_parameter_of_a_trunk_of_patches_works_for_several_bytes() -> None:
    for size in PARAMETERS["agiformer"]:
        family, config = get_family("agiformer"), _config("agiformer", size)
        assert family.flops(config, 1024) < 2 * family.num_parameters(config)
