"""Every variant at two tensor ranks against one process: loss and every gradient."""

from __future__ import annotations

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from parallel.context import ParallelContext
from parallel.pipeline import layer_costs
from tests.distributed import run_ranks
from tests.equivalence import Measured, measure
from tests.models.dynamic.cases import VARIANTS, config_of, family_of, tokens_of
from tests.tiers import tiered
from tests.tolerance import FP64, assert_close

SEQ, BATCH = 24, 2
SEGMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 12, 7])).int()


def _measured(ctx: ParallelContext) -> dict[str, Measured]:
    """Every variant, with documents packed in every other one."""
    stream, measured = tokens_of(SEQ + 1, batch=BATCH), {}
    for i, (variant, (family, changes)) in enumerate(VARIANTS.items()):
        config = config_of(family, **changes)
        segments = SEGMENTS.expand(BATCH, -1).contiguous() if i % 2 else None
        inputs = TokenInputs(stream[:, :-1].contiguous(), segments)
        labels = stream[:, 1:].contiguous()
        of, options = family_of(config), {"seed": 11, "noise": 0.2, "dtype": torch.float64}
        measured[variant] = measure(of, config, inputs, labels, ctx, **options)
    return measured


def _on_two_ranks(sequence_parallel: bool) -> dict[str, Measured]:
    return _measured(ParallelContext.from_world(tensor=2, sequence_parallel=sequence_parallel))


@pytest.fixture(scope="module")
def expected() -> dict[str, Measured]:
    return _measured(ParallelContext.single())


@pytest.mark.parametrize("sequence_parallel", tiered([False, True], [True]))
def test_two_tensor_ranks_equal_one_in_every_loss_and_every_gradient(sequence_parallel, expected):
    for measured in run_ranks(_on_two_ranks, 2, sequence_parallel):
        for variant, one in expected.items():
            two = measured[variant]
            torch.testing.assert_close(two.terms, one.terms, **FP64)
            assert two.gradients.keys() == one.gradients.keys()
            for name, gradient in one.gradients.items():
                place = f"{variant}: {name}"
                assert_close(two.gradients[name], gradient, FP64["rtol"], place)


def test_stages_are_cut_by_what_is_computed_not_by_what_is_stored():
    config = config_of("mod", capacity_gamma=0.25)
    _, dense, routed, *_ = layer_costs(family_of(config).layer_specs(config))
    assert routed == round(0.25 * dense + config.hidden_size)  # and the router, of every token
    pair_config = config_of("dtf", capacity_gamma=0.25, router_score="random")
    _, pair, *_ = layer_costs(family_of(pair_config).layer_specs(pair_config))
    assert pair == round(1.25 * dense)
