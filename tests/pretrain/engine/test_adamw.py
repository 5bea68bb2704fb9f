"""AdamW is torch's, bit for bit, and a start does not import torch's compiler for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from pretrain.engine.optimizers import FusedAdamW
from tests.pretrain.tiny_run import tiny_run, write_data

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
PROGRAM = """
import sys
from pretrain.train import main
assert main(sys.argv[1:]) == 0
print([name for name in ("torch._dynamo", "sympy", "transformers", "wandb") if name in sys.modules])
"""


def _step(optimizer, parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("cls", [FusedAdamW, torch.optim.AdamW])
def test_steps_and_a_restored_state_are_those_of_torch(cls):
    weights = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    first = cls(ours, **OPTIONS)
    oracle = torch.optim.AdamW(theirs, **OPTIONS)
    for seed in range(2):
        _step(first, ours, seed)
        _step(oracle, theirs, seed)
    restored = FusedAdamW(ours, **OPTIONS)
    restored.load_state_dict(first.state_dict())
    _step(restored, ours, 2)
    _step(oracle, theirs, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    states = (each.state_dict()["state"] for each in (restored, oracle))
    for own, other in zip(*(state.values() for state in states), strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)


def test_a_small_run_imports_no_compiler_and_nothing_else_that_it_does_not_need(tmp_path):
    write_data(tmp_path)
    changes = {"training__max_steps": 1, "training__warmup_steps": 0, "training__precision": "fp32"}
    config = tiny_run(tmp_path, run_dir=str(tmp_path / "run"), **changes)
    values = config.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(values))
    arguments = ["--config-name", "start", "--config-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
