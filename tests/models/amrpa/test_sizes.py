"""Pipeline boundaries that no history crosses; sizes are in tests/models/test_sizes.py."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.model import FAMILY
from models.amrpa.targets import live_after, plan_layers
from parallel.pipeline import layer_costs, partition

FOLDER = Path(__file__).parents[3] / "configs" / "model" / "amrpa"


def _config(size: str) -> AMRPALlamaConfig:
    return AMRPALlamaConfig.model_validate(yaml.safe_load((FOLDER / f"{size}.yaml").read_text()))


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
