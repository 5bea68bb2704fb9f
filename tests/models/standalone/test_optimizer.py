from __future__ import annotations

import pytest
import torch

from models.standalone.model import StandaloneModel
from models.standalone.optimizer import build_optimizer, build_scheduler
from tests.models.families import CASES


def test_every_parameter_is_in_the_group_of_its_part_and_role():
    model = StandaloneModel(CASES["llama"].family, CASES["llama"].config)
    optimizer = build_optimizer(model, 1e-3, 0.1, part_rates={"mlp": 1e-4, "absent": 1.0})
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["base_decay", "base_no_decay", "mlp_decay"]
    names = {id(p): name for name, p in model.named_parameters()}
    members = {g: [names[id(p)] for p in group["params"]] for g, group in groups.items()}
    assert sorted(name for group in members.values() for name in group) == sorted(names.values())
    assert all(".mlp." in name for name in members["mlp_decay"])
    assert all("norm" in name for name in members["base_no_decay"])
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [
        (1e-3, 0.1), (1e-3, 0.0), (1e-4, 0.1),
    ]  # fmt: skip


def test_the_schedule_warms_up_and_ends_at_its_share():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_scheduler(optimizer, warmup_steps=2, max_steps=10, min_ratio=0.25)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:2] == pytest.approx([0.5, 1.0])
    assert rates[-1] == pytest.approx(0.25)
