"""Copies of an injected model, by deepcopy and by pickle, and what a pass leaves behind."""

from __future__ import annotations

import copy
import pickle

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.amrpa import get_amrpa_loss
from models.amrpa.injection.attention import IMPLEMENTATION
from tests.models.amrpa.tiny import injected, inputs


def _gradients(model) -> dict[str, torch.Tensor]:
    """Of two passes before one backward pass."""
    torch.manual_seed(0)
    losses = []
    for seed in (1, 2):
        logits = model(**inputs("llama", seed=seed), use_cache=False).logits
        losses.append(logits.square().mean() + get_amrpa_loss(model))
    sum(losses).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_copy_of_a_checkpointed_model_recomputes_with_its_own_history():
    expected = _gradients(injected("llama").train())
    model = injected("llama").train()
    model.gradient_checkpointing_enable()
    found = _gradients(copy.deepcopy(model))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@torch.no_grad()
def test_a_pickled_model_is_routed_where_nothing_was_injected_before(monkeypatch):
    model = injected("bert")
    expected, written = model(**inputs("bert")).logits, pickle.dumps(model)
    monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION)
    again = pickle.loads(written)
    assert torch.equal(again(**inputs("bert")).logits, expected)
    assert type(again) is type(model)


@torch.no_grad()
def test_a_pass_of_the_base_model_alone_leaves_no_history():
    model = injected("llama")
    model.model(**inputs("llama"))
    assert [stack.current.history for stack in model.amrpa_state.stacks] == [{}]
