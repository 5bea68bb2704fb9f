"""Adapters whose weight follows the emotion state of a token or the persona of a row."""

from __future__ import annotations

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from models.daria_former.config import LORA_TARGETS
from models.daria_former.model import FAMILY
from models.daria_former.standalone.lora import LoRALinear, LoRAManager
from parallel.context import ParallelContext
from parallel.sharding import sum_partial_gradients
from tests.distributed import run_ranks
from tests.equivalence import full_gradients
from tests.models.daria_former.standalone.adapted import (
    CONFIG,
    TOKENS,
    logits_of,
    managed,
    plain_model,
)
from tests.tolerance import FP64


@pytest.mark.parametrize(("kind", "inputs"), [("esv", {}), ("persona", {"persona": 2})])
def test_gradient_reaches_A_B_and_kappa(kind, inputs):
    model, manager = managed()
    manager.freeze_base()
    manager.activate_adapter("first", weight=kind)
    if inputs:
        inputs = {"persona": torch.randn(2, CONFIG.persona_dim)}
    (logits_of(model, **inputs) * torch.randn(16, 2, CONFIG.vocab_size)).sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora.primary." in name or ".lora.first." in name or f".lora.{kind}.first" in name:
            # Slots have no emotion state, so an adapter that follows it is off there.
            off = kind == "esv" and ".persona." in name and ".first." in name
            assert off or parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_an_emotion_adapter_follows_the_state_of_each_token():
    model, manager = managed(targets=["up_proj"])
    manager.activate_adapter("first", weight="esv")
    block = model.block_1
    kappa = 3 * torch.randn(CONFIG.emotion_dim, dtype=torch.float64)
    block.lora.esv["first"].copy_(kappa)
    seen = {}

    def remember(module, args, output):
        seen["x"], seen["y"] = args[0], output

    block.register_forward_pre_hook(lambda m, args: seen.update(e=args[0].emotion))
    block.ffn.up_proj.register_forward_hook(remember)
    logits_of(model)
    weight = (seen["e"] @ kappa).clamp(0, 1).unsqueeze(-1)
    assert 0 < (weight > 0).float().mean() < 1
    lora, W = block.ffn.up_proj.lora, block.ffn.up_proj.weight
    expected = seen["x"] @ (W + lora["primary"].product()).T
    expected = expected + weight * (seen["x"] @ lora["first"].product().T)
    torch.testing.assert_close(seen["y"], expected, **FP64)


@torch.no_grad()
def test_a_persona_adapter_follows_the_persona_of_each_row():
    model, manager = managed()
    manager.activate_adapter("first", weight="persona")
    for block in model.layers[1:-1]:
        block.lora.persona["first"].fill_(100.0)
    persona = torch.stack([torch.ones(CONFIG.persona_dim), -torch.ones(CONFIG.persona_dim)])
    followed = logits_of(model, persona=persona)
    manager.activate_adapter("first", weight=1.0)
    torch.testing.assert_close(followed[:, 0], logits_of(model, persona=persona)[:, 0])
    manager.deactivate_adapter("first")
    torch.testing.assert_close(followed[:, 1], logits_of(model, persona=persona)[:, 1])


@torch.no_grad()
def test_following_adapters_decode_with_a_cache_as_in_one_pass():
    model, manager = managed()
    manager.activate_adapter("first", weight="persona")
    manager.activate_adapter("second", weight="esv")
    for block in model.layers[1:-1]:
        block.lora.persona["first"].normal_()
    persona = torch.randn(2, CONFIG.persona_dim)
    whole = logits_of(model, persona=persona)
    cache = model.new_cache(2, 16)
    parts = [model(DariaInputs(TOKENS[:, :5], persona=persona), cache).logits]
    other = model.new_cache(1, 16)
    for token in TOKENS[:, 5:].split(1, dim=1):
        model(TokenInputs(token[:1].contiguous()), other)  # another generation in between
        parts.append(model(TokenInputs(token.contiguous()), cache).logits)
    torch.testing.assert_close(torch.cat(parts), whole, **FP64)


def _follow_and_measure(tensor: int = 1, sequence_parallel: bool = False):
    ctx = ParallelContext.single()
    if tensor > 1:
        ctx = ParallelContext.from_world(tensor=tensor, sequence_parallel=sequence_parallel)
    model = plain_model(ctx=ctx).train()
    manager = LoRAManager(model, rank=3, alpha=1, targets=LORA_TARGETS)
    manager.inject()
    for name, kind in (("moody", "esv"), ("personal", "persona")):
        manager.add_adapter(name)
        manager.activate_adapter(name, weight=kind)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
            for adapter in layer.lora.values():
                adapter.B.fill_(0.1)  # the same at any layout
    sum_partial_gradients(model, ctx)
    output = model(TokenInputs(TOKENS))
    FAMILY.loss(output, TOKENS, config=CONFIG, ctx=ctx).total.backward()
    return full_gradients(model, ctx)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_following_adapters_have_the_same_gradients_on_two_tensor_ranks(sequence_parallel):
    expected = _follow_and_measure()
    assert sum(".lora.esv." in name or ".lora.persona." in name for name in expected) == 8
    for gradients in run_ranks(_follow_and_measure, 2, 2, sequence_parallel):
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                gradients[name], gradient, **FP64, msg=lambda m, n=name: f"{n}: {m}"
            )
