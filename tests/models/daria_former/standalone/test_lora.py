"""Adapters against the dense equation, and what a user does with them."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from models.common.lora.layers import wrap
from models.daria_former.adapters import BlockAdapters
from models.daria_former.config import LORA_TARGETS, DariaFormerConfig
from models.daria_former.standalone.lora import LoRALinear, LoRAManager, merged_state_dict
from tests.models.daria_former.standalone.adapted import (
    CONFIG,
    let_learn,
    logits_of,
    managed,
    plain_model,
)
from tests.models.families import CASES
from tests.refusals import assert_refused
from tests.tolerance import FP64

NATIVE = CASES["daria_former_lora"].config


def test_a_layer_is_the_dense_equation_in_fp64():
    base = nn.Linear(6, 5).double()
    W, bias = base.weight.detach().clone(), base.bias.detach().clone()
    holder = nn.ModuleDict({"block": nn.ModuleDict({"up_proj": base})})
    manager = LoRAManager(holder, rank=3, alpha=6.0, targets=["up_proj"])
    manager.inject()
    for name, rank, alpha, weight in (
        ("a", 2, 1.0, 0.7),
        ("b", 4, 8.0, -1.5),
        ("off", 2, 1.0, 9.0),
    ):
        manager.add_adapter(name, rank, alpha)
        manager.activate_adapter(name, weight)
    manager.deactivate_adapter("off")
    let_learn(holder)
    x = torch.randn(7, 2, 6, dtype=torch.float64)
    y = holder["block"]["up_proj"](x)
    lora = holder["block"]["up_proj"].lora
    dense = W + 6 / 3 * lora["primary"].B @ lora["primary"].A
    dense = (
        dense + 0.7 * 1 / 2 * lora["a"].B @ lora["a"].A - 1.5 * 8 / 4 * lora["b"].B @ lora["b"].A
    )
    torch.testing.assert_close(y, x @ dense.T + bias, rtol=1e-12, atol=1e-12)


def test_the_matrices_start_as_published():
    root = nn.ModuleDict({"q_proj": nn.Linear(400, 300)})
    LoRAManager(root, rank=64, targets=["q_proj"]).inject()
    A, B = root["q_proj"].lora["primary"].A, root["q_proj"].lora["primary"].B
    bound = 400**-0.5  # of kaiming_uniform with a = sqrt(5)
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.mean().abs() < 0.02 * bound
    assert not B.any()


def test_dropout_of_a_layer_acts_on_the_primary_input_while_training():
    layer = LoRALinear(nn.Linear(64, 8, bias=False), rank=64, alpha=64.0, dropout=0.5)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.lora["primary"].A.copy_(torch.eye(64))
        layer.lora["primary"].B.fill_(1.0)
    dropped = layer(torch.ones(500, 1, 64))
    assert dropped.mean().item() == pytest.approx(64.0, rel=0.05)
    assert dropped.std() > 1.0
    assert torch.equal(layer.eval()(torch.ones(1, 1, 64)), torch.full((1, 1, 8), 64.0))


@torch.no_grad()
def test_new_adapters_change_nothing():
    model = plain_model()
    before = logits_of(model)
    manager = LoRAManager(model, rank=4, targets=LORA_TARGETS)
    manager.inject()
    manager.add_adapter("extra")
    manager.activate_adapter("extra", weight="esv")
    # A projection with an adapter is a product of its own, no longer part of a joint one.
    torch.testing.assert_close(logits_of(model), before, **FP64)


@torch.no_grad()
def test_a_configuration_with_lora_rank_starts_as_the_plain_model():
    plain, native = plain_model(), plain_model(NATIVE)
    assert set(plain.state_dict()) < set(native.state_dict())
    torch.testing.assert_close(logits_of(native), logits_of(plain), **FP64)
    assert all(block.lora is None for block in plain.layers[1:-1])
    assert not any(isinstance(m, LoRALinear | BlockAdapters) for m in plain.modules())


@torch.no_grad()
def test_adapters_are_switched_and_stacked():
    model, manager = managed()
    primary = logits_of(model)
    manager.activate_adapter("first")
    one = logits_of(model)
    manager.activate_adapter("second", weight=0.5)
    both = logits_of(model)
    assert manager.active == {"first": 1.0, "second": 0.5}
    assert not torch.allclose(one, primary, atol=1e-3)
    assert not torch.allclose(both, one, atol=1e-3)
    manager.deactivate_adapter("second")
    assert torch.equal(logits_of(model), one)
    manager.activate_adapter("first", weight=0.0)
    torch.testing.assert_close(logits_of(model), primary)
    manager.deactivate_all_extras()
    assert torch.equal(logits_of(model), primary)
    assert manager.active == {}


@torch.no_grad()
def test_merging_changes_no_logit_and_unmerging_restores_every_bit():
    model, manager = managed()
    manager.activate_adapter("first", weight=0.7)
    expected = logits_of(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    manager.merge_all()
    torch.testing.assert_close(logits_of(model), expected, **FP64)
    assert not torch.equal(model.block_0.attention.q_proj.weight, weights[_Q])
    manager.unmerge_all()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits_of(model), expected)


_Q = "block_0.attention.q_proj.weight"


@torch.no_grad()
def test_stripping_leaves_a_plain_model_with_what_was_merged():
    model, manager = managed()
    manager.activate_adapter("first")
    expected = logits_of(model)
    manager.merge_all()
    plain = manager.strip()
    assert plain is model
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    fresh = plain_model()
    fresh.load_state_dict(model.state_dict())  # the original keys, all of them
    torch.testing.assert_close(logits_of(fresh), expected, **FP64)
    assert not any(len(b._forward_pre_hooks) for b in model.layers)
    LoRAManager(model, rank=2).inject()  # and it can begin anew


def test_a_weight_that_was_trained_while_merged_is_not_lost_silently():
    model, manager = managed()
    manager.merge_all()
    with torch.no_grad():
        model.get_parameter(_Q).add_(1.0)
    with assert_refused(
        "weight", value="changed", constraint="merged", remedy=("unmerge", "strip()")
    ):
        manager.unmerge_all()


def test_freezing_leaves_exactly_the_adapters_trainable():
    model, manager = managed()
    total = sum(p.numel() for p in model.parameters())
    manager.freeze_base()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".lora." in n}
    assert {id(p) for p in manager.lora_parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    plain = sum(p.numel() for p in plain_model().parameters())
    assert manager.num_lora_parameters() == total - plain
    manager.unfreeze_base()
    assert all(p.requires_grad for p in model.parameters())


def test_the_published_quick_start():
    model = plain_model()
    manager = LoRAManager(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])
    manager.inject()
    manager.freeze_base()

    # Add persona adapter
    manager.add_adapter("persona_style", rank=8)
    manager.activate_adapter("persona_style")

    # Runtime switching
    manager.deactivate_adapter("persona_style")
    with pytest.warns(UserWarning, match="'emotion_intense'.*persona_style"):
        manager.activate_adapter("emotion_intense", weight=0.5)

    assert manager.active == {"emotion_intense": 0.5}
    adapted = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    kinds = ("q_proj", *(f"paths.{p}.v_proj" for p in ("local", "long", "memory", "persona")))
    assert adapted == {f"block_{i}.attention.{kind}" for i in range(4) for kind in kinds}
    assert torch.isfinite(logits_of(model)).all()


@torch.no_grad()
def test_a_state_dict_becomes_the_same_model_and_the_same_merged_model():
    model, manager = managed()
    manager.activate_adapter("first", weight=0.7)
    manager.activate_adapter("second", weight="persona")
    expected = logits_of(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del tensors["head.output.weight"]  # tied
    state = safetensors.torch.load(safetensors.torch.save(tensors))
    state["head.output.weight"] = state["embedding.tokens.weight"]
    again = plain_model()
    restored = LoRAManager.from_state_dict(again, state)
    assert torch.equal(logits_of(again), expected)
    assert restored.settings() == manager.settings()
    with assert_refused("'second'", value="'persona'", constraint="number", remedy="deactivated"):
        merged_state_dict(state)
    restored.deactivate_adapter("second")
    expected = logits_of(again)
    merged = merged_state_dict(again.state_dict())
    plain = plain_model()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits_of(plain), expected, **FP64)
    restored.merge_all()
    with assert_refused(
        "adapters", value="merged", constraint="merged", remedy=("unmerge_all()", "strip()")
    ):
        again.state_dict()  # would count the adapters twice when it is loaded
    stripped = restored.strip().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(stripped[name], tensor, **FP64)


@torch.no_grad()
def test_a_model_built_with_adapters_is_merged_for_export():
    model = plain_model(NATIVE)
    let_learn(model)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert all(t.dtype == torch.bfloat16 for t in merged_state_dict(state, alpha=1.0).values())
    merged = merged_state_dict(model.state_dict(), alpha=NATIVE.lora_alpha)
    plain = plain_model()
    plain.load_state_dict(merged)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(plain), expected, **FP64)
    manager = LoRAManager(
        model, NATIVE.lora_rank, NATIVE.lora_alpha, NATIVE.lora_targets, NATIVE.lora_dropout
    )
    manager.inject()
    manager.add_adapter("extra")
    torch.testing.assert_close(logits_of(model), expected)
    with pytest.raises(ValueError, match="alpha=None"):
        merged_state_dict(plain.state_dict())
    alone = {k: v for k, v in model.state_dict().items() if not k.startswith("lora_settings")}
    with assert_refused("lora.extra.A", value="'extra'", constraint="alpha", remedy="manager"):
        merged_state_dict(alone, alpha=1.0)


@torch.no_grad()
def test_a_copy_of_a_model_has_adapters_of_its_own():
    model, manager = managed()
    manager.activate_adapter("first", weight="persona")
    expected = logits_of(model)
    twin = copy.deepcopy(model)
    twin.lora_settings.manager.deactivate_all_extras()
    assert not torch.equal(logits_of(twin), expected)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda m: m.deactivate_adapter("frist"), ("adapter", "'frist'", "exist", "first")),
        (
            lambda m: m.activate_adapter("first", weight="ESV"),
            ("weight", "'ESV'", "unknown", "esv"),
        ),
        (
            lambda m: m.activate_adapter("first", weight=float("nan")),
            ("weight", "nan", "finite", "number"),
        ),
        (lambda m: m.add_adapter("first"), ("adapter", "'first'", "exists", "name")),
        (lambda m: m.add_adapter("a.b"), ("adapter", "'a.b'", "identifier", "name")),
        (lambda m: m.add_adapter("keys"), ("adapter", "'keys'", "identifier", "name")),
        (lambda m: m.add_adapter("primary"), ("adapter", "'primary'", "identifier", "name")),
        (lambda m: m.add_adapter("new", rank=0), ("LoRA rank", 0, "alpha=0.0", "larger")),
        (lambda m: m.inject(), ("model", "LoRAManager", "already", "strip()")),
        (lambda m: m.unmerge_all(), ("adapters", "merged", "no", "merge_all()")),
        (
            lambda m: LoRAManager(m.model, targets=["q_prj"]),
            ("target", "'q_prj'", "unknown", "q_proj"),
        ),
        (lambda m: LoRAManager(m.model, targets=[]), ("targets", [], "empty", "q_proj")),
        (lambda m: LoRAManager(m.model).merge_all(), ("model", "adapters", "not have", "inject()")),
        (
            lambda m: LoRAManager.from_state_dict(m.model, {}),
            ("state dict", "lora_settings._extra_state", "no", "LoRAManager"),
        ),
    ],
)
def test_mistakes_are_named(call, parts):
    _, manager = managed()
    with assert_refused(*parts):
        call(manager)


def test_what_cannot_be_adapted_is_refused():
    gelu = CONFIG.model_copy(update={"ffn_activation": "gelu"})
    with assert_refused("target", value="'gate_proj'", constraint="layer", remedy="q_proj"):
        LoRAManager(plain_model(gelu), targets=["gate_proj"]).inject()
    with assert_refused(
        "lora_targets",
        value=["gate_proj"],
        constraint=("ffn_activation=swiglu", "gelu"),
        remedy="remove",
    ):
        DariaFormerConfig(lora_rank=2, lora_targets=["gate_proj"], ffn_activation="gelu")
    with assert_refused(
        "LoRA", value="torch.nn.modules.linear.Bilinear", constraint="linear", remedy="targets"
    ):
        wrap(nn.ModuleDict({"q_proj": nn.Bilinear(2, 2, 2)}), LORA_TARGETS, **_SMALL)
    with assert_refused(
        "q_proj", value=(3, 2.0, 0.2), constraint="(16, 32.0, 0.0)", remedy="configuration"
    ):
        LoRAManager(plain_model(NATIVE)).inject()
    pathless = plain_model(CONFIG.model_copy(update={"paths": ("local",)}))
    _, manager = managed(pathless)
    with assert_refused(
        "weight", value="'persona'", constraint="persona path", remedy=("paths", "number")
    ):
        manager.activate_adapter("first", weight="persona")
    plain = LoRAManager(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), targets=["q_proj"])
    plain.inject()
    with assert_refused("weight", value="'esv'", constraint="blocks", remedy="number"):
        plain.activate_adapter("x", weight="esv")


_SMALL = {"rank": 2, "alpha": 1.0, "dropout": 0.0}
