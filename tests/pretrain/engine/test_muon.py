from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn

from pretrain.engine.muon import BatchedMuon, disable_kernel_compilation

# Matrices of one shape and of its transpose, a single one, and what AdamW takes.
SHAPES = [(6, 4), (6, 4), (4, 6), (6, 4), (8, 8), (3,), (5,)]
EPS = torch.finfo(torch.float32).eps


def _parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    adam = {"betas": (0.9, 0.95), "eps": 1e-8}
    return [
        {"params": parameters[:3], "lr": 0.1, "weight_decay": 0.1, "use_muon": True},
        {"params": parameters[3:5], "lr": 0.05, "weight_decay": 0.0, "use_muon": True},
        {"params": parameters[5:], "lr": 0.01, "weight_decay": 0.1, "use_muon": False, **adam},
    ]


def _stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    for number in range(3):
        for parameter, gradient in zip(parameters, _parameters(number + 1), strict=True):
            parameter.grad = gradient.detach().clone()
        optimizer.step()


def _buffers(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Any]:
    return [optimizer.state[p] for p in parameters]


def test_batches_of_matrices_step_as_deepspeed_steps_each_of_them():
    theirs, ours = _parameters(), _parameters()
    reference, batched = MuonWithAuxAdam(_groups(theirs)), BatchedMuon(_groups(ours))
    with torch.compiler.set_stance("force_eager"):
        _stepped(reference, theirs)
    _stepped(batched, ours)
    # Three steps of five iterations, each of which magnifies rounding by its slope of 3.4 at most.
    bound = 3 * 3.5**5 * 8 * EPS
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    for a, b in zip(_buffers(batched, ours), _buffers(reference, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=8 * EPS, atol=8 * EPS)


def test_its_state_goes_on_from_a_checkpoint():
    whole, parts = _parameters(), _parameters()
    first, second = BatchedMuon(_groups(whole)), BatchedMuon(_groups(parts))
    _stepped(first, whole)
    _stepped(second, parts)
    resumed = BatchedMuon(_groups(parts))
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    _stepped(first, whole)
    _stepped(resumed, parts)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def test_a_step_whose_gradients_were_dropped_changes_nothing():
    parameters = _parameters()
    optimizer = BatchedMuon(_groups(parameters))
    _stepped(optimizer, parameters)
    before = copy.deepcopy((parameters, _buffers(optimizer, parameters)))
    for parameter in parameters:
        parameter.grad = None
    optimizer.step()
    torch.testing.assert_close(
        (parameters, _buffers(optimizer, parameters)), before, rtol=0, atol=0
    )


def test_no_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a kernel was handed to the compiler")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    parameters = _parameters()
    _stepped(BatchedMuon(_groups(parameters)), parameters)


def test_the_engines_run_the_kernels_as_they_are_written_too():
    from torch._dynamo.utils import counters

    disable_kernel_compilation()
    disable_kernel_compilation()
    gradient, momentum = _parameters()[0].detach(), torch.zeros(SHAPES[0])
    with torch.compiler.set_stance("force_eager"):
        expected = original_muon.muon_update(gradient.clone(), momentum.clone())
    counters.clear()
    found = original_muon.muon_update(gradient.clone(), momentum.clone())
    assert torch.equal(found, expected)
    assert not counters["frames"]
