"""Trainers of TRL: the first loss is that of the model itself."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from tests.models.engines.exports import Engine, tokenizer

_OPTIONS: dict[str, Any] = {
    "max_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
}
_TEXTS = ["the quick brown fox", "brown the"]


def _trained(trainer: Any) -> float:
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def _own_loss(engine: Engine) -> float:
    model, words = engine.load().train(), tokenizer()
    total, count = 0.0, 0
    for text in _TEXTS:
        row = words(text + "<|end|>", return_tensors="pt")["input_ids"]
        scored = row.shape[1] - 1
        total += model(row, labels=row, use_cache=False).loss.item() * scored
        count += scored
    return total / count


def _sft(engine: Engine, **options: Any) -> float:
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=engine.load(),
        args=SFTConfig(str(engine.folder), shuffle_dataset=False, **_OPTIONS, **options),
        train_dataset=Dataset.from_dict({"text": _TEXTS}),
        processing_class=tokenizer(),
    )
    return _trained(trainer)


def trl_sft(engine: Engine) -> None:
    assert abs(_sft(engine) - _own_loss(engine)) < 1e-3


def trl_sft_packed(engine: Engine) -> None:
    found = _sft(engine, packing=True, max_length=64)
    assert abs(found - _own_loss(engine)) < 1e-3


def trl_dpo(engine: Engine) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": ["the "] * 2, "chosen": ["quick fox"] * 2, "rejected": ["fox"] * 2}
    trainer = DPOTrainer(
        model=engine.load(),
        ref_model=engine.load(),
        args=DPOConfig(str(engine.folder), **_OPTIONS),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    # The two models are equal at first: -log sigmoid(0).
    assert abs(_trained(trainer) - 0.6931) < 1e-3


def trl_grpo(engine: Engine) -> None:
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=engine.load(),
        reward_funcs=lambda completions, **rest: [float(i) for i in range(len(completions))],
        args=GRPOConfig(str(engine.folder), num_generations=2, max_completion_length=6, **_OPTIONS),
        train_dataset=Dataset.from_dict({"prompt": ["the ", "fox "]}),
        processing_class=tokenizer(),
    )
    _trained(trainer)
