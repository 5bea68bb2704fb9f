"""What the names of the files promise: parameters, FLOPs, and boundaries without history."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.model import FAMILY
from models.amrpa.targets import live_after, plan_layers
from models.layer_counts import count_parameters
from parallel.pipeline import layer_costs, partition

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "amrpa"
# Parameters, and forward MFLOPs per token of 1024.
SIZES = {
    "tiny": (191_302, 1.7),
    "demo": (2_496_454, 8.3),
    "demo_wide": (4_089_732, 10.4),
    "125m": (134_895_368, 277.4),
    "350m": (374_853_640, 785.1),
    "1b3": (1_348_965_384, 2771.7),
    "7b": (6_745_103_368, 13705.7),
    "13b": (13_024_124_936, 26401.6),
    "70b": (68_989_627_400, 139215.5),
}


def _config(size: str) -> AMRPALlamaConfig:
    return AMRPALlamaConfig.model_validate(yaml.safe_load((FOLDER / f"{size}.yaml").read_text()))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_size_has_the_promised_parameters_and_flops(path):
    config = _config(path.stem)
    counted = count_parameters(FAMILY.layer_specs(config))
    assert FAMILY.num_parameters(config) == counted == SIZES[path.stem][0]
    assert FAMILY.flops(config, 1024) / 1e6 == pytest.approx(SIZES[path.stem][1], abs=0.05)


def test_every_promised_size_has_a_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize(
    ("size", "most_stages"),
    [("125m", 1), ("350m", 2), ("1b3", 2), ("7b", 4), ("13b", 4), ("70b", 8)],
)
def test_no_history_crosses_the_stages_that_a_run_cuts_by_default(size, most_stages):
    """The last eight blocks are in one stage up to these numbers of stages."""
    config = _config(size)
    specs = FAMILY.layer_specs(config)
    costs, plan = layer_costs(specs), plan_layers(config, config.num_layers)
    for stages in (2**i for i in range(1, most_stages.bit_length())):
        for _, stop in pairwise(partition(costs, stages)[:-1]):
            assert live_after(plan, stop - 2) == (), (stages, stop)  # block_i is layer i + 1
