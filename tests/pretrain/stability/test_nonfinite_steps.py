"""Non-finite losses and gradients, anywhere: all ranks skip the step and name the origin."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.distributed.consensus import RankGroup
from pretrain.engine.optimizers import propagate_nonfinite
from pretrain.errors import EXIT_COMPLETED, TrainingError
from pretrain.stability.nonfinite_steps import check_finite
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import final_weights, metrics, offloading, tiny_run, zero_file
from tests.refusals import assert_refused
from tests.tiers import tiered

STEPS, BAD = 5, 3
Zero = int | dict[str, Any]  # a ZeRO stage, or a section of its own


class Fault(NamedTuple):
    """A fault on one rank in the steps `steps`; only the first time where `once`."""

    where: str
    rank: int
    steps: tuple[int, ...] = (BAD,)
    once: bool = False


def _config(data: Path, run_dir: Path, **changes):
    return tiny_run(data, run_dir=str(run_dir), **({"training__max_steps": STEPS} | changes))


def _broken(config, ds_config_path, fault: Fault) -> tuple[int | str, str]:
    """`run` with a fault in it: its exit code, or its error, and what it has logged."""
    import os

    import pretrain.engine.train_spec
    import pretrain.loop
    import pretrain.run

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pretrain").addHandler(handler)
    now = {"step": 0, "times": 0}

    def strikes() -> bool:
        here = int(os.environ["RANK"]) == fault.rank and now["step"] in fault.steps
        return here and not (fault.once and now["times"] > 0)

    original_train = pretrain.loop.TrainLoop._train
    original_objective = pretrain.engine.train_spec.TrainSpec.objective
    original_build = pretrain.run.build_engine

    def train(self, step, *args):
        now.update(step=step, times=0)
        return original_train(self, step, *args)

    def objective(self, output, targets):
        total, terms = original_objective(self, output, targets)
        if fault.where == "loss" and strikes():
            total = propagate_nonfinite(total + float("inf"))
        return total, terms

    def build_engine(*args, **kwargs):
        engine = original_build(*args, **kwargs)
        train_step = engine.train_step

        def counted(*args, **kwargs):
            result = train_step(*args, **kwargs)
            now["times"] += 1
            return result

        engine.train_step = counted
        named = dict(engine.module.named_modules())
        name = next(n for n in named if n.endswith("norm"))
        if fault.where == "weight" and int(os.environ["RANK"]) == fault.rank:
            with torch.no_grad():
                parameter = next(engine.module.parameters())
                getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = float("nan")
        if fault.where == "activation":
            named[name].register_forward_hook(
                lambda module, inputs, output: output * float("nan") if strikes() else None
            )
        if fault.where == "gradient":
            parameter = next(p for p in engine.module.parameters() if p.requires_grad)
            parameter.register_hook(lambda g: g * float("inf") if strikes() else None)
        return engine

    pretrain.loop.TrainLoop._train = train
    pretrain.engine.train_spec.TrainSpec.objective = objective
    pretrain.run.build_engine = build_engine
    try:
        end: int | str = run_training(config, ds_config_path)
    except TrainingError as error:
        end = str(error)
    return end, "\n".join(lines)


def _run(config, fault: Fault, world_size: int, zero: Zero) -> list[tuple[int | str, str]]:
    ds_config = zero_file(zero, Path(config.run_dir))
    return run_ranks(_broken, world_size, config, ds_config, fault, init=False)


def _curve(config) -> list[tuple[float, ...]]:
    return [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in metrics(config)[0]]


NOBODY = Fault("nowhere", -1)
DP2: dict[str, Any] = {"training__batch_size": 2}
BF16 = {"training__precision": "bf16"}
EXPERTS = CASES["mod_experts"].config.model_dump()
MUON = {"training__optimizer": "muon"}
NO_CLIP = {"training__grad_clip": 0.0}
LAYOUTS: dict[str, tuple[int, Zero, dict[str, Any]]] = {
    "ZeRO-0": (1, 0, {}),
    "ZeRO-0 DP2": (2, 0, DP2),
    "ZeRO-1 DP2": (2, 1, DP2),
    "ZeRO-2 DP2": (2, 2, DP2),
    "ZeRO-3 DP2": (2, 3, DP2),
    "bf16 ZeRO-1": (1, 1, BF16),
    "bf16 ZeRO-2 DP2": (2, 2, DP2 | BF16),
    "bf16 ZeRO-3 DP2": (2, 3, DP2 | BF16),
    "TP2": (2, 1, {"parallel__tensor": 2}),
    "PP2": (2, 1, {"parallel__pipeline": 2}),
    "PP2 bf16": (2, 1, {"parallel__pipeline": 2} | BF16),
    "no clipping": (2, 1, DP2 | NO_CLIP),
    "mod": (1, 1, {"model": CASES["mod"].config.model_dump()}),
    "experts": (2, 1, DP2 | {"model": EXPERTS, "parallel__expert": 2}),
    "offload": (2, offloading(1), DP2),
    "bf16 offload": (1, offloading(1), BF16),
    "bf16 offload ZeRO-2 DP2": (2, offloading(2), DP2 | BF16),
    "bf16 offload ZeRO-3 DP2": (2, offloading(3), DP2 | BF16),
    "bf16 offload TP2": (2, offloading(1), {"parallel__tensor": 2} | BF16),
    "bf16 offload PP2": (2, offloading(1), {"parallel__pipeline": 2} | BF16),
    "bf16 offload experts": (
        2, offloading(1), DP2 | BF16 | {"model": EXPERTS, "parallel__expert": 2},
    ),
    "Muon ZeRO-0": (1, 0, MUON),
    "Muon bf16 PP2": (2, 1, MUON | BF16 | {"parallel__pipeline": 2}),
    "Muon bf16 DP2": (2, 1, MUON | DP2 | BF16),
    "Muon bf16 experts": (1, 1, MUON | BF16 | {"model": EXPERTS}),
}  # fmt: skip


ORDINARY = {
    ("ZeRO-3 DP2", "gradient"),
    ("bf16 ZeRO-2 DP2", "activation"),
    ("mod", "gradient"),
    ("bf16 offload PP2", "loss"),
    ("Muon bf16 experts", "gradient"),
}


CASES_OF_FAULTS = itertools.product(LAYOUTS, ["loss", "activation", "gradient"])


@pytest.mark.parametrize(("layout", "where"), tiered(CASES_OF_FAULTS, ORDINARY))
def test_every_rank_leaves_the_step_out_and_the_run_goes_on_as_without_it(
    layout, where, data, tmp_path
):
    world_size, stage, changes = LAYOUTS[layout]
    expected = _config(data, tmp_path / "a", stability__skip_steps=[[BAD, BAD]], **changes)
    ends = _run(expected, NOBODY, world_size, stage)
    assert [code for code, _ in ends] == [EXIT_COMPLETED] * world_size
    assert f"step {BAD}: its data are skipped" in ends[0][1]

    faulted = _config(data, tmp_path / "b", **changes)
    # Only the last stage of a pipeline has a loss.
    rank = 1 if where == "loss" and "PP2" in layout else world_size - 1
    ends = _run(faulted, Fault(where, rank), world_size, stage)
    assert [code for code, _ in ends] == [EXIT_COMPLETED] * world_size
    said = ends[0][1]
    assert f"step {BAD}: loss" in said
    named = {"loss": r"the gradient of \S+", "activation": r"the output of \S+norm"}
    named["gradient"] = r"the gradient of \S+"
    # Over tensor or expert ranks the loss of one goes on to the other.
    if not (where == "loss" and ("TP2" in layout or "parallel__expert" in changes)):
        assert re.search(rf"it begins on rank {rank} with {named[where]}, in samples \d+ to", said)
    assert "of the run (train token" in said
    assert _curve(faulted) == _curve(expected)
    assert [r["skipped_steps"] for r in metrics(faulted)[0]] == [0, 0, 1, 1]
    weights = final_weights(expected)
    for name, weight in final_weights(faulted).items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    "layout",
    tiered(
        ["ZeRO-0", "ZeRO-3 DP2", "PP2", "mod", "bf16 offload"],
        ["ZeRO-3 DP2", "PP2", "mod", "bf16 offload"],
    ),
)
def test_a_fault_that_does_not_come_again_changes_nothing(layout, data, tmp_path):
    world_size, stage, changes = LAYOUTS[layout]
    undisturbed = _config(data, tmp_path / "a", **changes)
    _run(undisturbed, NOBODY, world_size, stage)
    faulted = _config(data, tmp_path / "b", **changes)
    (_, said), *_ = _run(faulted, Fault("activation", 0, once=True), world_size, stage)
    assert re.search(rf"step {BAD}: loss nan, .*; rerun, it is finite \(loss \d", said)
    assert _curve(faulted) == _curve(undisturbed)
    weights = final_weights(undisturbed)
    for name, weight in final_weights(faulted).items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("layout", tiered(["ZeRO-0", "ZeRO-2 DP2", "PP2"], ["ZeRO-2 DP2", "PP2"]))
def test_too_many_steps_in_a_row_end_the_run_at_its_last_checkpoint(layout, data, tmp_path):
    world_size, stage, changes = LAYOUTS[layout]
    config = _config(data, tmp_path, stability__max_skipped_steps=1, **changes)
    fault = Fault("activation", world_size - 1, steps=(3, 4, 5))
    ends = _run(config, fault, world_size, stage)
    assert len({end for end, _ in ends}) == 1
    assert "step 4: " in str(ends[0][0])
    assert "2 steps in a row were not finite" in str(ends[0][0])
    assert "start again from it with stability.skip_steps=[[3,4]]" in str(ends[0][0])
    steps = sorted(path.name for path in Path(config.run_dir, "checkpoints").glob("step_*"))
    assert steps == ["step_2"]


def test_a_run_that_is_started_again_goes_on_counting(data, tmp_path):
    changes: dict[str, Any] = {"training__max_steps": 10, "stability__max_skipped_steps": 3}
    fault = Fault("activation", 0, steps=tuple(range(3, 11)))
    for _ in range(2):
        ((end, _),) = _run(_config(data, tmp_path, **changes), fault, 1, 0)
        assert str(end).startswith("step 6: ")
        assert "4 steps in a row were not finite" in str(end)
    steps = sorted(path.name for path in Path(tmp_path, "checkpoints").glob("step_*"))
    assert steps == ["step_2", "step_4"]  # saved within the row: the weights are those of step 2


@pytest.mark.parametrize(
    "layout", tiered(["ZeRO-1 DP2", "ZeRO-3 DP2", "PP2"], ["ZeRO-3 DP2", "PP2"])
)
def test_a_weight_that_is_not_finite_ends_the_run_at_once(layout, data, tmp_path):
    world_size, stage, changes = LAYOUTS[layout]
    config = _config(data, tmp_path, **changes)
    ends = _run(config, Fault("weight", 1), world_size, stage)
    assert len({end for end, _ in ends}) == 1
    assert re.match(r"step 1: it begins on rank 1 with parameter \S+ itself", str(ends[0][0]))
    assert not list(Path(config.run_dir, "checkpoints").glob("step_*"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_never_saved(value):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    check_finite(module, RankGroup(), step=7)
    with torch.no_grad():
        module[1].bias[1] = value
    with assert_refused(
        "step", value=7, constraint=("1.bias", "rank 0"), remedy="training.lr", error=TrainingError
    ):
        check_finite(module, RankGroup(), step=7)


@pytest.mark.parametrize("factor", [1.0, 1e30])
def test_a_finite_loss_keeps_its_value_and_gradient(factor):
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    loss = propagate_nonfinite((x * factor).square().sum())
    loss.backward()
    assert loss.isfinite() == (factor == 1.0)
    if factor == 1.0:
        assert torch.equal(loss, torch.tensor(6.25))
        assert torch.equal(x.grad, torch.tensor([3.0, -4.0]))
    else:
        assert x.grad.isnan().all()
