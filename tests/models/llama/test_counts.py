from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.checkpoint import parameter_table
from models.llama.config import LlamaConfig
from models.llama.counts import forward_flops_per_token, num_parameters
from models.llama.model import FAMILY

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "llama"
# What the names of the files promise, in parameters.
SIZES = {
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
}


def _config(path: Path) -> LlamaConfig:
    return LlamaConfig.model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_formula_counts_the_parameters_of_every_configured_size(path):
    config = _config(path)
    counted = sum(info.shape.numel() for info in parameter_table(FAMILY, config).values())
    assert num_parameters(config) == counted == SIZES[path.stem]


def test_flops_of_long_sequences_approach_the_quadratic_term():
    config = _config(FOLDER / "7b.yaml")
    short, long = (forward_flops_per_token(config, length) for length in (4096, 8192))
    # Each added key costs a query one product for its score and one for its value, half on average.
    assert long - short == pytest.approx(32 * 4096 * 4 * 4096 / 2)


def test_flops_of_short_sequences_are_two_per_parameter_that_multiplies():
    config = _config(FOLDER / "7b.yaml")
    embedding = config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    linear = 2 * (num_parameters(config) - embedding - norms)
    assert forward_flops_per_token(config, 1) == pytest.approx(linear + 32 * 4 * 4096)
