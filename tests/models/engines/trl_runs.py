"""Trainers of TRL: the first loss is that of the model itself."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, logsigmoid

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
    """The cross entropy of the texts, each alone: without a family's own terms."""
    model, words = engine.load().train(), tokenizer()
    total, count = 0.0, 0
    for text in _TEXTS:
        row = words(text + "<|end|>", return_tensors="pt")["input_ids"]
        logits = model(row, use_cache=False).logits[0, :-1]
        total += cross_entropy(logits, row[0, 1:], reduction="sum").item()
        count += row.shape[1] - 1
    return total / count


def _packed_loss(engine: Engine) -> float:
    """The cross entropy of the texts in one row, as the model itself has it in training."""
    model, words = engine.load().train(), tokenizer()
    rows = [words(text + "<|end|>", return_tensors="pt")["input_ids"] for text in _TEXTS]
    row = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(each.shape[1]) for each in rows]).unsqueeze(0)
    logits = model(row, position_ids=positions, use_cache=False).logits[0, :-1]
    targets = row[0, 1:].masked_fill(positions[0, 1:] == 0, -100)
    return cross_entropy(logits, targets).item()


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
    assert abs(found - _packed_loss(engine)) < 1e-3
    # In training mod chooses the best tokens of a row, and dart draws its noise from the row.
    if engine.family not in ("mod", "dart"):
        assert abs(found - _own_loss(engine)) < 1e-3


def trl_dpo(engine: Engine) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": ["the"] * 2, "chosen": [" quick fox"] * 2, "rejected": [" fox"] * 2}
    trainer = DPOTrainer(
        model=engine.load(),
        ref_model=engine.load(),
        args=DPOConfig(str(engine.folder), beta=0.1, **_OPTIONS),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    # The reference is the same model in evaluation, where some families compute something else.
    gain = {
        text: _log_likelihood(engine.load().train(), text) - _log_likelihood(engine.load(), text)
        for text in (" quick fox", " fox")
    }
    expected = -logsigmoid(torch.tensor(0.1 * (gain[" quick fox"] - gain[" fox"]))).item()
    assert abs(_trained(trainer) - expected) < 1e-3


@torch.no_grad()
def _log_likelihood(model: Any, text: str) -> float:
    """Of a text and its end after the prompt."""
    words = tokenizer()
    row = words("the" + text + "<|end|>", return_tensors="pt")["input_ids"]
    first = len(words("the")["input_ids"])
    logits = model(row, use_cache=False).logits[0, first - 1 : -1]
    return -cross_entropy(logits, row[0, first:], reduction="sum").item()


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
