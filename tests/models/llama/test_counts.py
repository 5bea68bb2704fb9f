from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.llama.config import LlamaConfig
from models.llama.counts import forward_flops_per_token, num_parameters

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "llama"


def _config(path: Path) -> LlamaConfig:
    return LlamaConfig.model_validate(yaml.safe_load(path.read_text()))


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
