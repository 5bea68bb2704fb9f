"""Muon updates each matrix, and each expert of a stack, by its equation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest
import torch
from torch import Tensor

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading.builders import build_train_loader
from models.base import TokenInputs
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.config import RunConfig
from pretrain.engine.parameter_groups import treatment_of
from pretrain.engine.train_spec import TrainSpec, build_precision
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import SEQ, VOCAB, final_weights, tiny_run, zero_file

LR, DECAY, MOMENTUM = 0.1, 0.1, 0.95


def _config(data, run_dir, **changes) -> RunConfig:
    values = {
        "model": CASES["mod_experts"].config.model_dump(),
        "training__optimizer": "muon",
        # In bf16 one step: weights that are rounded have another second gradient.
        "training__max_steps": 2 if changes.get("training__precision") == "fp32" else 1,
        "training__warmup_steps": 0,
        "training__schedule": "constant",
        "training__lr": LR,
        "training__weight_decay": DECAY,
        "training__grad_clip": 0.0,
    }
    return tiny_run(data, run_dir=str(run_dir), **values | changes)


def _orthogonalised(g: Tensor) -> Tensor:
    """Newton-Schulz of https://kellerjordan.github.io/posts/muon, one matrix at a time, in fp64."""
    if g.dim() > 2:
        return torch.stack([_orthogonalised(each) for each in g])
    x = g.double() / (g.double().norm() + 1e-7)
    x = x.mT if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.mT if g.shape[0] > g.shape[1] else x
    return x * math.sqrt(max(1.0, g.shape[0] / g.shape[1]))


class _Muon:
    """Momentum of one matrix or stack, and AdamW of everything else: `p -= lr * update`."""

    def __init__(self, parameter: Tensor, *, is_matrix: bool, decay: float) -> None:
        self.parameter, self.is_matrix, self.decay = parameter, is_matrix, decay
        self.momentum = torch.zeros_like(parameter, dtype=torch.float64)
        self.square = torch.zeros_like(self.momentum)
        self.count = 0

    @torch.no_grad()
    def step(self, gradient: Tensor, config: RunConfig) -> None:
        g, p = gradient.double(), self.parameter
        self.count += 1
        if self.is_matrix:
            self.momentum.lerp_(g, 1 - MOMENTUM)
            update = _orthogonalised(g.lerp(self.momentum, MOMENTUM))
        else:
            b1, b2 = config.training.betas
            self.momentum.lerp_(g, 1 - b1)
            self.square.lerp_(g.square(), 1 - b2)
            scale = (self.square / (1 - b2**self.count)).sqrt() + config.training.eps
            update = self.momentum / (1 - b1**self.count) / scale
        p.copy_(p.double() * (1 - LR * self.decay) - LR * update)


class Expected(NamedTuple):
    """Weights before the first step and after it; names of Muon's matrices; gradients."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    matrices: set[str]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def expected(request, data) -> Expected:
    return _expected(data, request.param)


def _expected(data, precision: str) -> Expected:
    """Steps of the equations, of gradients in the dtype of the run that are summed in fp32."""
    config = _config(data, data / "none", training__precision=precision)
    spec = TrainSpec.of(config, None, ParallelContext.single(precision=build_precision(config)))
    model = SequentialModel(spec.layer_specs(), spec.ctx, seed=config.training.seed)
    model.to(spec.ctx.precision.dtype)
    masters = {name: p.detach().float() for name, p in model.named_parameters()}
    before = {name: master.clone() for name, master in masters.items()}
    treatments = {n: treatment_of(n, p, config.training) for n, p in model.named_parameters()}
    matrices = {name for name, treatment in treatments.items() if treatment.optimizer == "muon"}
    steps = {
        name: _Muon(master, is_matrix=name in matrices, decay=treatments[name].weight_decay)
        for name, master in masters.items()
    }
    with build_train_loader(
        config.data, sequence_length=SEQ, micro_batch_size=4, micro_batches_per_step=2,
        data_rank=0, data_size=1, seed=config.training.seed, vocab_size=VOCAB,
    ) as loader:  # fmt: skip
        for _ in range(config.training.max_steps):
            sums = {name: torch.zeros_like(master) for name, master in masters.items()}
            for _ in range(2):
                model.zero_grad()
                batch = next(loader)
                total, _ = spec.objective(model(TokenInputs(batch.tokens)), (batch.labels, None))
                (total / 2).backward()
                for name, parameter in model.named_parameters():
                    sums[name] += parameter.grad.float()
            for name, parameter in model.named_parameters():
                steps[name].step(sums[name], config)
                parameter.data.copy_(masters[name])
    return Expected(before, masters, matrices, sums)


DP2 = {"training__batch_size": 2}
LAYOUTS: dict[str, dict[str, tuple[int, int, dict[str, Any]]]] = {
    "fp32": {"ZeRO-0": (1, 0, {}), "ZeRO-0 DP2": (2, 0, DP2)},
    "bf16": {
        "ZeRO-1": (1, 1, {}),
        "ZeRO-1 DP2": (2, 1, DP2),
        "PP2": (2, 1, {"parallel__pipeline": 2}),
    },
}


def test_a_step_is_that_of_the_equations_at_every_layout(expected, data, tmp_path, request):
    precision = request.node.callspec.params["expected"]
    for name, (world_size, stage, changes) in LAYOUTS[precision].items():
        config = _config(data, tmp_path / name, **changes, training__precision=precision)
        file = zero_file(stage, tmp_path)
        assert run_ranks(run_training, world_size, config, file, init=False) == [0] * world_size
        _compare(final_weights(config), expected, name, is_bf16=precision == "bf16")


def _compare(found: dict[str, Tensor], expected: Expected, layout: str, *, is_bf16: bool) -> None:
    before, after, matrices, gradients = expected
    # The gradient of a key's bias is rounding alone, and AdamW scales it up.
    for name in (name for name in after if not name.endswith("key.bias")):
        moved = (after[name] - before[name]).norm()
        # It computes in fp16 or fp32, by the machine, and five iterations make small singular
        # values up to 3.4^5 times as large and with them the errors of a gradient.
        bound = (0.15 if is_bf16 else 0.01) * moved
        if is_bf16:  # the weights are those of the masters, rounded
            bound += 2.0**-9 * after[name].norm()
        error = found[name].float() - after[name]
        if is_bf16 and name not in matrices:
            # AdamW's first step is the sign of the gradient: in bf16 an entry that is small beside
            # the others has either, and moves by one step at most.
            size = gradients[name].abs()
            is_certain = size > 0.05 * size.square().mean().sqrt()
            assert is_certain.sum() > 0.8 * size.numel()
            most = LR * (1 + DECAY * before[name].abs()) + 2.0**-8 * after[name].abs()
            step = (found[name].float() - before[name]).abs()
            assert (step <= most)[~is_certain].all(), f"{name} at {layout}"
            error = error[is_certain]
        assert error.norm() <= bound, f"{name} at {layout}"
    stacks = [name for name in matrices if name.endswith("experts.gate")]
    assert len(stacks) == 4
    assert all(found[name].dim() == 3 for name in stacks)
