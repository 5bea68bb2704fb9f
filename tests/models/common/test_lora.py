"""Adapters on a family that has none of its own: llama."""

from __future__ import annotations

import torch
from torch import nn

from models.common.lora.manager import LoRAManager
from models.common.lora.state import merged_state_dict
from models.standalone.model import StandaloneModel
from models.standalone.optimizer import build_optimizer
from models.standalone.trainer import Trainer, TrainerSettings
from tests.models.families import CASES
from tests.refusals import assert_refused
from tests.tolerance import FP64

CASE = CASES["llama"]
TOKENS = torch.randint(0, CASE.config.vocab_size, (2, 17))
BATCH = (TOKENS[:, :-1], TOKENS[:, 1:])


def _managed() -> tuple[StandaloneModel, LoRAManager]:
    torch.manual_seed(0)
    model = StandaloneModel(CASE.family, CASE.config)
    manager = LoRAManager(model, rank=2, alpha=4, targets=["query", "down"])
    manager.inject()
    return model, manager


def test_only_the_adapters_of_llama_train_and_merging_changes_no_loss():
    model, manager = _managed()
    manager.freeze_base()
    base = {n: p.clone() for n, p in model.named_parameters() if ".lora." not in n}
    optimizer = build_optimizer(model, lr=0.0, part_rates={"lora": 1e-2})
    assert [group["name"] for group in optimizer.param_groups] == ["lora_decay"]
    settings = TrainerSettings(max_steps=5, log_every=1)
    history = Trainer(model, settings, [BATCH], optimizer=optimizer).train()
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())

    model.double().eval()
    expected = model.loss(*BATCH).total
    plain = StandaloneModel(CASE.family, CASE.config).double().eval()
    plain.load_state_dict(merged_state_dict(model.state_dict()))
    torch.testing.assert_close(plain.loss(*BATCH).total, expected, **FP64)
    manager.merge_all()
    torch.testing.assert_close(model.loss(*BATCH).total, expected, **FP64)


def test_a_checkpoint_with_adapters_continues_and_is_refused_where_it_would_lose_them(tmp_path):
    model, _ = _managed()
    settings = TrainerSettings(max_steps=2, log_every=1, save_dir=tmp_path, save_every=1)
    first = Trainer(model, settings, [BATCH], optimizer=build_optimizer(model, lr=1e-2)).train()
    again, _ = _managed()
    rest = Trainer(again, settings, [BATCH], optimizer=build_optimizer(again, lr=1e-2))
    rest.load(tmp_path / "checkpoint-1")
    assert rest.train() == first[1:]
    plain = StandaloneModel(CASE.family, CASE.config)
    trainer = Trainer(plain, settings, [BATCH], optimizer=build_optimizer(plain, lr=1e-2))
    with assert_refused("checkpoint-1", "StandaloneModel", "lora_settings", "adapters"):
        trainer.load(tmp_path / "checkpoint-1")


def test_what_a_family_does_not_follow_is_named():
    _, manager = _managed()
    manager.add_adapter("style")
    with assert_refused("weight", value="'esv'", constraint="unknown", remedy="none"):
        manager.activate_adapter("style", weight="esv")
    with assert_refused("target", value="'querry'", constraint="unknown", remedy="query"):
        LoRAManager(nn.ModuleDict({"query": nn.Linear(2, 2)}), targets=["querry"])
