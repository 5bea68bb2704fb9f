from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from models.layer_counts import count_flops, count_parameters
from models.registry import get_config_class, get_family
from parallel.carry import LayerSpec
from parallel.context import ParallelContext
from parallel.sharding import Normal, declare_replicated
from tests.models.families import CASES
from tests.refusals import assert_refused

SIZES = sorted(Path(__file__).parents[2].glob("configs/model/*/*.yaml"))


@pytest.mark.parametrize("path", SIZES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_layers_of_every_size_have_as_many_parameters_as_the_closed_form_says(path):
    values = yaml.safe_load(path.read_text())
    family = get_family(values["family"])
    config = get_config_class(values["family"]).model_validate(values)
    counted = replace(family, counts=None)
    assert counted.num_parameters(config) == family.num_parameters(config)
    if family.name == "llama":
        assert counted.flops(config, 4096) == family.flops(config, 4096)


@pytest.mark.parametrize("name", ["llama", "llama_qwen2_shape"])
def test_flops_of_a_dense_decoder_need_no_closed_form(name):
    """Tied or not, with biases or without: the contract test compares the closed form with torch's
    own counter."""
    family, config = CASES[name]
    for length in (1, 32, 33):
        assert replace(family, counts=None).flops(config, length) == family.flops(config, length)


class Mixer(nn.Module):
    """A matrix that is no weight of a linear layer, beside one that is."""

    def __init__(self, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6, device=ctx.device)
        self.gain = declare_replicated(
            nn.Parameter(torch.empty(4, device=ctx.device)), Normal(1.0), ctx=ctx
        )
        self.mixing = declare_replicated(
            nn.Parameter(torch.empty(4, 4, device=ctx.device)), Normal(1.0), ctx=ctx
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gain * (x @ self.mixing))


class CountedMixer(Mixer):
    def flops_per_token(self, seq_length: int) -> float:
        return 2.0 * self.mixing.numel() + seq_length


def test_a_matrix_of_unknown_cost_is_refused_until_its_module_says_what_it_costs():
    remedy = ("Mixer", "flops_per_token(seq_length)", "toy")
    with assert_refused("mixer.mixing", [4, 4], "unknown", remedy):
        count_flops([LayerSpec("mixer", Mixer)], 10, family="toy")
    assert count_flops([LayerSpec("mixer", CountedMixer)], 10, family="toy") == 32 + 10 + 48


def test_a_tied_parameter_counts_once():
    specs = [LayerSpec("a", Mixer), LayerSpec("b", Mixer, tied={"mixing": "a.mixing"})]
    assert count_parameters(specs) == 2 * (24 + 6 + 4) + 16
