from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.checkpoint import parameter_table
from models.common.config import DecoderConfig
from models.dynamic.counts import capacity_of, forward_flops_per_token, num_parameters
from models.dynamic.token_router import capacity
from models.llama.config import LlamaConfig
from models.llama.counts import forward_flops_per_token as dense_flops
from models.registry import get_config_class
from tests.models.dynamic.cases import VARIANTS, config_of, family_of, model_of

CONFIGS = Path(__file__).parents[3] / "configs" / "model"


def _config(path: Path):
    values = yaml.safe_load(path.read_text())
    return get_config_class(values["family"]).model_validate(values)


def _dense(config) -> LlamaConfig:
    names = set(DecoderConfig.model_fields) - {"family"}
    return LlamaConfig(**{name: getattr(config, name) for name in names})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula_counts_the_parameters_of_every_variant(variant):
    family, changes = VARIANTS[variant]
    config = config_of(family, **changes)
    assert num_parameters(config) == sum(p.numel() for p in model_of(config).parameters())


# Of the body: the head is of the same size at any capacity. T = 2048, gamma = .5, .25, .125.
@pytest.mark.parametrize(
    ("size", "family", "expected"),
    [
        ("0b5", "mod", (0.736, 0.615, 0.557)),
        ("1b5", "mod", (0.742, 0.619, 0.559)),
        ("7b", "mod", (0.746, 0.622, 0.561)),
        ("0b5", "dtf", (0.748, 0.627, 0.568)),
        ("7b", "dtf", (0.760, 0.635, 0.574)),
    ],
)
def test_flops_of_the_body_over_those_of_the_plain_stack(size, family, expected):
    config = _config(CONFIGS / family / f"{size}.yaml")
    head = 2.0 * config.vocab_size * config.hidden_size
    plain = dense_flops(_dense(config), 2048) - head
    for gamma, ratio in zip((0.5, 0.25, 0.125), expected, strict=True):
        routed = config.model_copy(update={"capacity_gamma": gamma})
        body = forward_flops_per_token(routed, 2048) - head
        assert body / plain == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize("family", ["mod", "dtf"])
def test_at_capacity_one_parameters_and_flops_are_those_of_the_plain_stack(family):
    config = config_of(family, capacity_gamma=1.0)
    assert forward_flops_per_token(config, 64) == dense_flops(_dense(config), 64)
    assert num_parameters(config) == sum(
        info.shape.numel() for info in parameter_table(family_of(config), config).values()
    )


@pytest.mark.parametrize(("gamma", "multiple"), [(0.5, 1), (0.125, 16), (0.3, 7), (1.0, 1)])
def test_counts_and_layers_agree_on_the_capacity(gamma, multiple):
    config = config_of("mod", capacity_gamma=gamma, capacity_multiple=multiple)
    for length in (1, 5, 32, 100):
        assert capacity_of(config, length) == capacity(gamma, length, multiple=multiple)
