"""Every setting of the DeepSpeed JSON that is accepted trains as one process without it does."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.config import parse_config
from pretrain.config.deepspeed import _owned
from pretrain.config.deepspeed_keys import ACCEPTED, STAGE_3_ONLY
from pretrain.engine.train_spec import TrainSpec
from tests.distributed import run_ranks
from tests.pretrain.engine.ds_options import (
    LAYOUTS,
    NOT_TRIED,
    REPORTS,
    TRIED,
    Trained,
    config_of,
    dtypes_of_sums,
    leaves,
    train,
)
from tests.pretrain.layout import Layout
from tests.pretrain.run_values import run_values
from tests.pretrain.tiny_run import write_data
from tests.tiers import tiered


def test_every_key_that_is_accepted_is_in_the_table():
    owned = set(_owned(parse_config(run_values()), 1))
    tables = [owned, set(TRIED), set(REPORTS), set(NOT_TRIED)]
    assert set().union(*tables) == set(leaves(ACCEPTED))
    assert sum(map(len, tables)) == len(set().union(*tables)), "a key is in two tables"


class References:
    """One process at ZeRO-0 (in bf16, which needs ZeRO, at ZeRO-1), trained once each."""

    def __init__(self, directory: Path) -> None:
        write_data(directory)
        self.directory = directory
        self._kept: dict[tuple[str, bool], tuple[Trained, dict[str, torch.Tensor]]] = {}

    def get(self, precision: str, *, experts: bool) -> tuple[Trained, dict[str, torch.Tensor]]:
        """What was measured, and what each parameter has moved by."""
        key = (precision, experts)
        if key not in self._kept:
            single = Layout(stage=0 if precision == "fp32" else 1)
            config = config_of(single, precision, self.directory, experts=experts)
            folder = self.directory / f"{precision}_{experts}"
            folder.mkdir()
            trained = train(config, {"reference": single.file({})}, folder)["reference"]
            assert isinstance(trained, Trained)
            spec = TrainSpec.of(config, None, ParallelContext.single())
            model = SequentialModel(spec.layer_specs(), spec.ctx, seed=config.training.seed)
            begun = {name: p.detach() for name, p in model.named_parameters()}
            masters = trained.masters()
            moved = {name: master - _part(begun, name) for name, master in masters.items()}
            assert max(trained.norms) > config.training.grad_clip, "the clipping must bite"
            self._kept[key] = trained, moved
        return self._kept[key]


def _part(begun: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter, or one of its stacked experts."""
    if name in begun:
        return begun[name]
    stacked, _, index = name.rpartition(".")
    return begun[stacked][int(index)]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> References:
    return References(tmp_path_factory.mktemp("references"))


_TIMED = {"wall_clock_breakdown", "flops_profiler.enabled"}


def _is_refused(settings: dict[str, Any], layout: Layout, precision: str) -> bool:
    """What is refused at a layout: it would have no effect there, or train another model."""
    names = {key.split(".")[1] for key in settings if key.startswith("zero_optimization.")}
    only_3 = {n for n in names if n in STAGE_3_ONLY or n.startswith("stage3_")}
    return (
        (layout.stage == 0 and bool(names))
        or (layout.stage != 3 and bool(only_3))
        or (precision == "fp32" and settings.get("communication_data_type") == "bf16")
        or (layout.pipeline > 1 and bool(settings.keys() & _TIMED))
        or (layout.expert > 1 and bool(names & {"reduce_scatter", "contiguous_gradients"}))
    )


def _settings(layout: Layout) -> dict[str, dict[str, Any]]:
    """Name of a file -> what it sets."""
    files = {f"{key} {i}": each for key, cases in TRIED.items() for i, each in enumerate(cases)}
    reports = {
        key: value
        for key, value in REPORTS.items()
        if not _is_refused({key: value}, layout, "bf16")
    }
    return {"nothing": {}, **files, "reports": reports}


_ORDINARY = {
    ("ZeRO-2 DP2", "fp32"),
    ("ZeRO-3", "bf16"),
    ("PP2 offload", "bf16"),
}
_CASES = [
    (name, precision)
    for precision, name in itertools.product(("fp32", "bf16"), LAYOUTS)
    if (name, precision) != ("ZeRO-0 DP2", "bf16")  # refused: bf16 needs ZeRO
]


@pytest.mark.parametrize(("name", "precision"), tiered(_CASES, _ORDINARY))
def test_every_option_trains_as_one_process_or_is_refused(name, precision, references, tmp_path):
    layout = LAYOUTS[name]
    experts = layout.expert > 1
    config = config_of(layout, precision, references.directory, experts=experts)
    settings = _settings(layout)
    files = {file: layout.file(values) for file, values in settings.items()}
    found = train(config, files, tmp_path)
    reference = references.get(precision, experts=experts)
    wrong = {
        file: problem
        for file, values in settings.items()
        if (problem := _problem(found[file], values, layout, precision, reference)) is not None
    }
    assert not wrong


def _problem(found, settings, layout, precision, reference) -> str | None:
    if _is_refused(settings, layout, precision):
        if isinstance(found, Trained):
            return "accepted"
        named = any(key in found for key in settings)
        return None if named and "\n" not in found and ";" in found else f"told badly: {found}"
    if not isinstance(found, Trained):
        return f"refused: {found}"
    return _difference(found, *reference, precision=precision)


def _difference(found, reference, moved, *, precision: str) -> str | None:
    """What is not that of one process beyond rounding: every gradient passes through the dtype of
    the run once, and once more in a sum over ranks or micro-batches. What a step changes begins
    the next one, whose numbers are off by as much again."""
    eps = torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).eps
    bound = 100 * eps if precision == "fp32" else eps
    for what in ("losses", "norms"):
        pairs = zip(getattr(found, what), getattr(reference, what), strict=True)
        for step, (ours, theirs) in enumerate(pairs, start=1):
            if not math.isclose(ours, theirs, rel_tol=step * bound):
                return f"{what}, step {step}: {ours}, expected {theirs}"
    if found.folder is None:
        return None
    bound *= len(reference.losses)
    ours, theirs = found.masters(), reference.masters()
    if ours.keys() != theirs.keys():
        return f"other parameters: {sorted(ours.keys() ^ theirs.keys())}"
    norms = {name: (ours[name] - theirs[name]).norm() for name in theirs}
    whole = torch.stack([x.norm() for x in moved.values()]).norm()
    difference = torch.stack(list(norms.values())).norm() / whole
    if difference > bound:
        return f"all weights moved elsewhere by {difference:.1e} of their way"
    # Of one parameter with a small gradient, sums of many terms of either sign, more remains.
    for name, norm in norms.items():
        if norm > 16 * bound * moved[name].norm() + bound / len(moved) * whole:
            return f"{name} moved elsewhere by {norm / moved[name].norm():.1e} of its way"
    return None


@pytest.mark.parametrize(
    "name", ["ZeRO-1 DP2", "ZeRO-1 DP2 offload", "ZeRO-2 DP2", "ZeRO-3 DP2", "PP2 DP2 offload"]
)
def test_gradients_of_bf16_are_summed_over_ranks_in_fp32(name, references, tmp_path):
    layout = LAYOUTS[name]
    config = config_of(layout, "bf16", references.directory, experts=False)
    arguments = (config, layout.file({}), tmp_path)
    found = run_ranks(dtypes_of_sums, layout.world_size, *arguments, init=False)
    assert set().union(*found) == {torch.float32}


def test_the_precision_of_sums_over_ranks_is_that_of_the_file(references, tmp_path):
    layout = LAYOUTS["ZeRO-1 DP2"]
    config = config_of(layout, "bf16", references.directory, experts=False)
    values = layout.file({"communication_data_type": "bf16"})
    found = run_ranks(dtypes_of_sums, 2, config, values, tmp_path, init=False)
    assert torch.bfloat16 in set().union(*found)
