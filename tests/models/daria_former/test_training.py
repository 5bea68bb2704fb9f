from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.daria_former import DariaFormerModel
from models.daria_former.lora import LoRAManager
from models.daria_former.stored import load_checkpoint, write_checkpoint
from models.daria_former.training import (
    DariaFormerLoss,
    Trainer,
    build_optimizer,
    build_scheduler,
)
from tests.models.daria_former.shrunk import shrunk

STREAM = torch.randint(0, 16, (6, 25), generator=torch.Generator().manual_seed(0))
BATCHES = [
    {"input_ids": STREAM[i : i + 2, :-1], "labels": STREAM[i : i + 2, 1:]} for i in (0, 2, 4)
]


def _trainer(**options) -> Trainer:
    torch.manual_seed(0)
    config = shrunk()
    options = {"lr": 1e-3, "max_steps": 6, "warmup_steps": 2, "log_every": 1} | options
    return Trainer(DariaFormerModel(config), config, BATCHES, **options)


def test_a_continued_training_equals_an_undisturbed_one(tmp_path):
    whole = _trainer(save_dir=tmp_path / "a", save_every=4)
    expected = whole.train()
    rest = _trainer(resume_from=tmp_path / "a" / "checkpoint-4").train()
    assert [r["loss"] for r in rest] == [r["loss"] for r in expected[4:]]
    assert [r["lr"] for r in rest] == [r["lr"] for r in expected[4:]]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_accumulated_batches_equal_one_batch_of_all():
    together = [{k: torch.cat([b[k] for b in BATCHES]) for k in ("input_ids", "labels")}]
    parts = _trainer(max_steps=1, gradient_accumulation_steps=3)
    whole = _trainer(max_steps=1)
    whole.train_dataloader = together
    (expected,), (found,) = whole.train(), parts.train()
    for name in ("loss", "lm_loss", "memory_loss", "repetition_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_evaluation_is_the_cross_entropy_alone():
    trainer = _trainer(eval_dataloader=BATCHES, eval_every=3, max_steps=3)
    recorded = trainer.train()[-1]["eval_loss"]
    model = trainer.model.eval()
    with torch.no_grad():
        nats = [
            F.cross_entropy(model(b["input_ids"])["logits"].flatten(0, 1), b["labels"].flatten())
            for b in BATCHES
        ]
    assert recorded == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)


def test_the_losses_are_the_weighted_sum_of_their_terms():
    config = shrunk(emotion_loss_weight=0.3, repetition_loss_weight=0.2, memory_loss_weight=0.1)
    tensors = {
        "logits": torch.randn(2, 8, 257),
        "hidden_states": torch.randn(2, 8, 64),
        "emotions": torch.rand(2, 8, 16),
        "emotion_logits": torch.randn(2, 8),
        "emotion_labels": torch.tensor([1, 3]),
        "memory_readout": torch.randn(2, 3, 64),
        "memory_target": torch.randn(2, 3, 64),
    }
    labels = STREAM[:2, :8].clone()
    labels[0, :3] = -100
    terms = DariaFormerLoss(config)(labels=labels, **tensors)
    ce = F.cross_entropy(tensors["logits"].flatten(0, 1), labels.flatten(), ignore_index=-100)
    steps = (tensors["emotions"][:, 1:] - tensors["emotions"][:, :-1]).square().sum(-1).mean()
    emotion = F.cross_entropy(tensors["emotion_logits"], tensors["emotion_labels"]) + 0.1 * steps
    assert terms["ce_loss"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert terms["emotion_loss"].item() == pytest.approx(emotion.item(), rel=1e-5)
    total = (
        terms["ce_loss"] + 0.3 * terms["emotion_loss"] + 0.2 * terms["repetition_loss"]
        + config.rhythm_loss_weight * terms["rhythm_loss"] + 0.1 * terms["memory_loss"]
    )  # fmt: skip
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_groups_of_the_optimizer_have_their_rates():
    model = DariaFormerModel(shrunk())
    LoRAManager(model, rank=2).inject()
    groups = build_optimizer(model, lr=1e-4, emotion_lr=3e-4).param_groups
    rates = {group["lr"] for group in groups}
    assert sorted(rates) == pytest.approx([1e-4, 3e-4, 1e-3])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(p.ndim < 2 for g in groups if g["weight_decay"] == 0 for p in g["params"])


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


@torch.no_grad()
def test_a_checkpoint_with_adapters_is_read_and_merged(tmp_path):
    trainer = _trainer(save_dir=tmp_path / "run", max_steps=2)
    manager = LoRAManager(trainer.model, rank=2)
    manager.inject()
    for parameter in manager.lora_parameters():
        parameter += 0.05
    trainer.save(tmp_path / "checkpoint-0")
    expected = trainer.model.eval()(STREAM)["logits"]
    model, _ = load_checkpoint(tmp_path / "checkpoint-0", device="cpu")
    torch.testing.assert_close(model(STREAM)["logits"], expected)
    with pytest.raises(ValueError, match="use --merge_lora"):
        write_checkpoint(model, tmp_path / "step_0", tokenizer=None, merge=False)
    write_checkpoint(model, tmp_path / "step_1", tokenizer=None, merge=True)
    merged, _ = load_checkpoint(tmp_path / "step_1", device="cpu")
    assert not any(".lora." in name for name in merged.state_dict())
    torch.testing.assert_close(merged(STREAM)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_bad_settings_and_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps=0"):
        _trainer(max_steps=0)
    trainer = _trainer()
    trainer.train_dataloader = []
    with pytest.raises(ValueError, match="no batches"):
        trainer.train()
    _trainer(max_steps=1, save_dir=tmp_path).train()
    config = shrunk(num_layers=1, esv_sites=1)
    with pytest.raises(ValueError, match="another configuration"):
        Trainer(DariaFormerModel(config), config, BATCHES, resume_from=tmp_path / "checkpoint-1")
