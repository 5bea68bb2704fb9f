"""With masked labels a step is the same however its batch is cut: loss, terms, every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading.batch import IGNORED_LABEL
from pretrain.run_data import open_training_data
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.first_step import first_step
from tests.pretrain.tiny_run import tiny_run
from tests.tiers import tiered
from tests.tolerance import FP32_NORM, assert_close

SAMPLES = 8
NO_CLIPPING = {"training__grad_clip": 1e9}  # but the norm is computed

# Losses beside the cross entropy weigh enough to be seen beside it.
_HEAVY = {
    "daria_former": {
        "weight_tying": False,  # a pipeline names both copies of a tied matrix
        **{f"{name}_loss_weight": 1.0 for name in ("emotion", "memory", "rhythm")},
    },
    "dtf": {"prior_loss_weight": 1.0},
    "mod_experts": {
        f"{name}_weight": 0.1 for name in ("router_z_loss", "expert_balance_loss", "expert_z_loss")
    },
}
MODELS = {
    name: CASES[name].config.model_copy(update=changes).model_dump()
    for name, changes in ({"llama": {}} | _HEAVY).items()
}

# world size, ZeRO stage, gradient accumulation, other settings
CUTS = {
    "accumulation 2": (1, 0, 2, {}),
    "accumulation 4": (1, 1, 4, {}),
    "data 2": (2, 1, 1, {}),
    "data 2, accumulation 4, ZeRO-2": (2, 2, 4, {}),
    "data 2, accumulation 2, ZeRO-3": (2, 3, 2, {}),
    "pipeline 2": (2, 1, 1, {"parallel__pipeline": 2}),
    "pipeline 2, accumulation 4": (2, 1, 4, {"parallel__pipeline": 2}),
    "pipeline 2 x data 2, accumulation 2": (4, 1, 2, {"parallel__pipeline": 2}),
}
RUNS = [("llama", cut) for cut in CUTS]
ORDINARY = [
    ("llama", "data 2, accumulation 4, ZeRO-2"),
    ("llama", "data 2, accumulation 2, ZeRO-3"),
    ("llama", "pipeline 2 x data 2, accumulation 2"),
]
RUNS += [
    (name, cut)
    for name in _HEAVY
    for cut in ("accumulation 4", "data 2, accumulation 4, ZeRO-2", "pipeline 2, accumulation 4")
]
ORDINARY += [(name, "pipeline 2, accumulation 4") for name in _HEAVY]


def _config(data: Path, world_size: int, accumulation: int, *, model: str = "llama", **changes):
    data_size = world_size // changes.get("parallel__pipeline", 1)
    return tiny_run(
        data,
        model=MODELS[model],
        data__reset_at_documents=True,
        training__batch_size=SAMPLES // accumulation // data_size,
        training__gradient_accumulation_steps=accumulation,
        **changes,
    )


@pytest.fixture(scope="module")
def wholes(data):
    """Of each model one process, one micro-batch: a mean without any bookkeeping."""
    return {
        name: run_ranks(
            first_step, 1, _config(data, 1, 1, model=name, **NO_CLIPPING), 0, init=False
        )[0]
        for name in MODELS
    }


@pytest.mark.parametrize(("model", "cut"), tiered(RUNS, ORDINARY))
def test_a_step_with_masked_labels_is_the_same_at_every_cut(model, cut, data, wholes):
    world_size, stage, accumulation, changes = CUTS[cut]
    config = _config(data, world_size, accumulation, model=model, **NO_CLIPPING, **changes)
    whole, eps = wholes[model], torch.finfo(torch.float32).eps
    seen = set()
    for own in run_ranks(first_step, world_size, config, stage, init=False):
        assert own.loss == pytest.approx(whole.loss, rel=FP32_NORM)
        assert own.norm == pytest.approx(whole.norm, rel=FP32_NORM)
        assert own.terms == pytest.approx(whole.terms, rel=FP32_NORM, abs=1e-7)
        for name, gradient in own.gradients.items():
            assert_close(gradient, whole.gradients[name], FP32_NORM, name, floor=eps * whole.norm)
        seen |= own.gradients.keys()
    assert seen == whole.gradients.keys()


def test_the_cuts_hold_different_numbers_of_scored_tokens(data):
    """Or the test above would hold for a mean over micro-batches as well."""
    from parallel.context import ParallelContext

    config = _config(data, 1, 4)
    with open_training_data(config, ParallelContext.single().data) as loader:
        counts = [int((next(loader).labels != IGNORED_LABEL).sum()) for _ in range(4)]
    assert len(set(counts)) > 1
