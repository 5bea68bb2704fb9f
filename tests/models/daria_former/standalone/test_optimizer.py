from __future__ import annotations

import pytest
import torch

from models.daria_former import DariaFormerModel
from models.daria_former.standalone.lora import LoRAManager
from models.daria_former.standalone.training import build_optimizer, build_scheduler
from tests.models.daria_former.shrunk import shrunk


def test_groups_of_the_optimizer_have_their_rates():
    model = DariaFormerModel(shrunk())
    LoRAManager(model, rank=2).inject()
    groups = build_optimizer(model, lr=1e-4, emotion_lr=3e-4).param_groups
    rates = {group["lr"] for group in groups}
    assert sorted(rates) == pytest.approx([1e-4, 3e-4, 1e-3])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    still = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    path = model.layers[0].attention.paths["local"]
    assert {id(path.query_gain), id(path.key_gain)} <= still  # per head, and vectors all the same
    assert id(path.k_proj.weight) not in still
    assert all(id(p) in still for p in model.parameters() if p.ndim < 2)


def test_groups_hold_what_their_names_say():
    model = DariaFormerModel(shrunk())
    manager = LoRAManager(model, rank=2)
    manager.inject()
    groups = {group["name"]: group for group in build_optimizer(model, lr=1e-4).param_groups}
    assert list(groups) == [
        "base_decay", "base_no_decay", "emotion_decay", "emotion_no_decay", "lora_decay",
    ]  # fmt: skip
    members = {id(p): name for name, group in groups.items() for p in group["params"]}
    for site in model.emotion:
        assert {members[id(p)].split("_")[0] for p in site.parameters()} == {"emotion"}
    assert all(members[id(p)].startswith("lora") for p in manager.lora_parameters())
    assert members[id(model.layers[0].ffn.emotion)] == "base_decay"
    manager.freeze_base()
    names = [group["name"] for group in build_optimizer(model, lr=1e-4).param_groups]
    assert all(name.startswith("lora") for name in names)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze some"):
        build_optimizer(model, lr=1e-4)


def test_an_emotion_rate_of_zero_is_zero():
    groups = build_optimizer(DariaFormerModel(shrunk()), lr=1e-4, emotion_lr=0.0).param_groups
    assert {g["lr"] for g in groups if g["name"].startswith("emotion")} == {0.0}


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_scheduler(optimizer, warmup_steps=4, max_steps=20)
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[20] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)
