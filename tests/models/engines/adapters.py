"""LoRA by PEFT on every linear layer: trained, saved, loaded, merged and generated with."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.models.engines.exports import GREEDY, TOKENS, Engine, assert_near, logits_of


def _adapted(engine: Engine, task_type: str | None) -> None:
    torch.manual_seed(0)
    model = engine.load()
    options = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False,
        task_type=task_type,
    )  # fmt: skip
    adapted = get_peft_model(model, options)
    adapted.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    adapted.eval()
    idle = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"adapters without gradient: {idle}"
    adapted.save_pretrained(engine.folder)
    before = logits_of(adapted)
    assert not torch.allclose(before, logits_of(engine.load()), atol=1e-2)
    again = PeftModel.from_pretrained(engine.load(), engine.folder).eval()
    assert_near(logits_of(again), before)
    text = adapted.generate(input_ids=TOKENS, **GREEDY)
    merged = adapted.merge_and_unload()
    assert_near(logits_of(merged), before)
    assert torch.equal(merged.generate(TOKENS, **GREEDY), text)


def peft_causal_lm(engine: Engine) -> None:
    _adapted(engine, "CAUSAL_LM")


def peft_without_task_type(engine: Engine) -> None:
    _adapted(engine, None)
