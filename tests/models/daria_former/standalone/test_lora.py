"""Adapters against the dense equation, and what a user does with them."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.common.lora.layers import wrap
from models.daria_former.adapters import BlockAdapters
from models.daria_former.carry import DariaInputs
from models.daria_former.config import LORA_TARGETS, DariaFormerConfig
from models.daria_former.model import FAMILY, layer_specs
from models.daria_former.standalone.lora import LoRALinear, LoRAManager, merged_state_dict
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.sharding import sum_partial_gradients
from tests.distributed import run_ranks
from tests.equivalence import full_gradients
from tests.models.families import CASES
from tests.refusals import assert_refused
from tests.tolerance import FP64

CONFIG = CASES["daria_former"].config
NATIVE = CASES["daria_former_lora"].config
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


def _model(config: DariaFormerConfig = CONFIG, ctx: ParallelContext | None = None):
    ctx = ctx or ParallelContext.single()
    return SequentialModel(layer_specs(config), ctx, seed=1).eval().double()


def _logits(model: nn.Module, **inputs) -> torch.Tensor:
    return model(DariaInputs(TOKENS, **inputs)).logits


def _managed(model: nn.Module | None = None, **settings) -> tuple[nn.Module, LoRAManager]:
    """A model whose primary adapter, and `first` and `second`, have learned something."""
    model = model or _model()
    manager = LoRAManager(model, **{"rank": 4, "alpha": 2, "targets": LORA_TARGETS} | settings)
    manager.inject()
    manager.add_adapter("first", rank=2)
    manager.add_adapter("second", rank=3, alpha=1)
    _learn(model)
    return model, manager


def _learn(model: nn.Module, *, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=std, generator=generator)


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
    _learn(holder)
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
    model = _model()
    before = _logits(model)
    manager = LoRAManager(model, rank=4, targets=LORA_TARGETS)
    manager.inject()
    manager.add_adapter("extra")
    manager.activate_adapter("extra", weight="esv")
    # A projection with an adapter is a product of its own, no longer part of a joint one.
    torch.testing.assert_close(_logits(model), before, **FP64)


@torch.no_grad()
def test_a_configuration_with_lora_rank_starts_as_the_plain_model():
    plain, native = _model(), _model(NATIVE)
    assert set(plain.state_dict()) < set(native.state_dict())
    torch.testing.assert_close(_logits(native), _logits(plain), **FP64)
    assert all(block.lora is None for block in plain.layers[1:-1])
    assert not any(isinstance(m, LoRALinear | BlockAdapters) for m in plain.modules())


@torch.no_grad()
def test_adapters_are_switched_and_stacked():
    model, manager = _managed()
    primary = _logits(model)
    manager.activate_adapter("first")
    one = _logits(model)
    manager.activate_adapter("second", weight=0.5)
    both = _logits(model)
    assert manager.active == {"first": 1.0, "second": 0.5}
    assert not torch.allclose(one, primary, atol=1e-3)
    assert not torch.allclose(both, one, atol=1e-3)
    manager.deactivate_adapter("second")
    assert torch.equal(_logits(model), one)
    manager.activate_adapter("first", weight=0.0)
    torch.testing.assert_close(_logits(model), primary)
    manager.deactivate_all_extras()
    assert torch.equal(_logits(model), primary)
    assert manager.active == {}


@torch.no_grad()
def test_merging_changes_no_logit_and_unmerging_restores_every_bit():
    model, manager = _managed()
    manager.activate_adapter("first", weight=0.7)
    expected = _logits(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    manager.merge_all()
    torch.testing.assert_close(_logits(model), expected, **FP64)
    assert not torch.equal(model.block_0.attention.q_proj.weight, weights[_Q])
    manager.unmerge_all()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(_logits(model), expected)


_Q = "block_0.attention.q_proj.weight"


@torch.no_grad()
def test_stripping_leaves_a_plain_model_with_what_was_merged():
    model, manager = _managed()
    manager.activate_adapter("first")
    expected = _logits(model)
    manager.merge_all()
    plain = manager.strip()
    assert plain is model
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    fresh = _model()
    fresh.load_state_dict(model.state_dict())  # the original keys, all of them
    torch.testing.assert_close(_logits(fresh), expected, **FP64)
    assert not any(len(b._forward_pre_hooks) for b in model.layers)
    LoRAManager(model, rank=2).inject()  # and it can begin anew


def test_a_weight_that_was_trained_while_merged_is_not_lost_silently():
    model, manager = _managed()
    manager.merge_all()
    with torch.no_grad():
        model.get_parameter(_Q).add_(1.0)
    with assert_refused(
        "weight", value="changed", constraint="merged", remedy=("unmerge", "strip()")
    ):
        manager.unmerge_all()


def test_freezing_leaves_exactly_the_adapters_trainable():
    model, manager = _managed()
    total = sum(p.numel() for p in model.parameters())
    manager.freeze_base()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".lora." in n}
    assert {id(p) for p in manager.lora_parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    plain = sum(p.numel() for p in _model().parameters())
    assert manager.num_lora_parameters() == total - plain
    manager.unfreeze_base()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("kind", "inputs"), [("esv", {}), ("persona", {"persona": 2})])
def test_gradient_reaches_A_B_and_kappa(kind, inputs):
    model, manager = _managed()
    manager.freeze_base()
    manager.activate_adapter("first", weight=kind)
    if inputs:
        inputs = {"persona": torch.randn(2, CONFIG.persona_dim)}
    (_logits(model, **inputs) * torch.randn(16, 2, CONFIG.vocab_size)).sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora.primary." in name or ".lora.first." in name or f".lora.{kind}.first" in name:
            # Slots have no emotion state, so an adapter that follows it is off there.
            off = kind == "esv" and ".persona." in name and ".first." in name
            assert off or parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_an_emotion_adapter_follows_the_state_of_each_token():
    model, manager = _managed(targets=["up_proj"])
    manager.activate_adapter("first", weight="esv")
    block = model.block_1
    kappa = 3 * torch.randn(CONFIG.emotion_dim, dtype=torch.float64)
    block.lora.esv["first"].copy_(kappa)
    seen = {}

    def remember(module, args, output):
        seen["x"], seen["y"] = args[0], output

    block.register_forward_pre_hook(lambda m, args: seen.update(e=args[0].emotion))
    block.ffn.up_proj.register_forward_hook(remember)
    _logits(model)
    weight = (seen["e"] @ kappa).clamp(0, 1).unsqueeze(-1)
    assert 0 < (weight > 0).float().mean() < 1
    lora, W = block.ffn.up_proj.lora, block.ffn.up_proj.weight
    expected = seen["x"] @ (W + lora["primary"].product()).T
    expected = expected + weight * (seen["x"] @ lora["first"].product().T)
    torch.testing.assert_close(seen["y"], expected, **FP64)


@torch.no_grad()
def test_a_persona_adapter_follows_the_persona_of_each_row():
    model, manager = _managed()
    manager.activate_adapter("first", weight="persona")
    for block in model.layers[1:-1]:
        block.lora.persona["first"].fill_(100.0)
    persona = torch.stack([torch.ones(CONFIG.persona_dim), -torch.ones(CONFIG.persona_dim)])
    followed = _logits(model, persona=persona)
    manager.activate_adapter("first", weight=1.0)
    torch.testing.assert_close(followed[:, 0], _logits(model, persona=persona)[:, 0])
    manager.deactivate_adapter("first")
    torch.testing.assert_close(followed[:, 1], _logits(model, persona=persona)[:, 1])


@torch.no_grad()
def test_following_adapters_decode_with_a_cache_as_in_one_pass():
    model, manager = _managed()
    manager.activate_adapter("first", weight="persona")
    manager.activate_adapter("second", weight="esv")
    for block in model.layers[1:-1]:
        block.lora.persona["first"].normal_()
    persona = torch.randn(2, CONFIG.persona_dim)
    whole = _logits(model, persona=persona)
    cache = model.new_cache(2, 16)
    parts = [model(DariaInputs(TOKENS[:, :5], persona=persona), cache).logits]
    other = model.new_cache(1, 16)
    for token in TOKENS[:, 5:].split(1, dim=1):
        model(TokenInputs(token[:1].contiguous()), other)  # another generation in between
        parts.append(model(TokenInputs(token.contiguous()), cache).logits)
    torch.testing.assert_close(torch.cat(parts), whole, **FP64)


def test_the_published_quick_start():
    model = _model()
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
    assert torch.isfinite(_logits(model)).all()


@torch.no_grad()
def test_a_state_dict_becomes_the_same_model_and_the_same_merged_model():
    model, manager = _managed()
    manager.activate_adapter("first", weight=0.7)
    manager.activate_adapter("second", weight="persona")
    expected = _logits(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del tensors["head.output.weight"]  # tied
    state = safetensors.torch.load(safetensors.torch.save(tensors))
    state["head.output.weight"] = state["embedding.tokens.weight"]
    again = _model()
    restored = LoRAManager.from_state_dict(again, state)
    assert torch.equal(_logits(again), expected)
    assert restored.settings() == manager.settings()
    with assert_refused("'second'", value="'persona'", constraint="number", remedy="deactivated"):
        merged_state_dict(state)
    restored.deactivate_adapter("second")
    expected = _logits(again)
    merged = merged_state_dict(again.state_dict())
    plain = _model()
    plain.load_state_dict(merged)
    torch.testing.assert_close(_logits(plain), expected, **FP64)
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
    model = _model(NATIVE)
    _learn(model)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert all(t.dtype == torch.bfloat16 for t in merged_state_dict(state, alpha=1.0).values())
    merged = merged_state_dict(model.state_dict(), alpha=NATIVE.lora_alpha)
    plain = _model()
    plain.load_state_dict(merged)
    expected = _logits(model)
    torch.testing.assert_close(_logits(plain), expected, **FP64)
    manager = LoRAManager(
        model, NATIVE.lora_rank, NATIVE.lora_alpha, NATIVE.lora_targets, NATIVE.lora_dropout
    )
    manager.inject()
    manager.add_adapter("extra")
    torch.testing.assert_close(_logits(model), expected)
    with pytest.raises(ValueError, match="alpha=None"):
        merged_state_dict(plain.state_dict())
    alone = {k: v for k, v in model.state_dict().items() if not k.startswith("lora_settings")}
    with assert_refused("lora.extra.A", value="'extra'", constraint="alpha", remedy="manager"):
        merged_state_dict(alone, alpha=1.0)


@torch.no_grad()
def test_a_copy_of_a_model_has_adapters_of_its_own():
    model, manager = _managed()
    manager.activate_adapter("first", weight="persona")
    expected = _logits(model)
    twin = copy.deepcopy(model)
    twin.lora_settings.manager.deactivate_all_extras()
    assert not torch.equal(_logits(twin), expected)
    assert torch.equal(_logits(model), expected)


def _follow_and_measure(tensor: int = 1, sequence_parallel: bool = False):
    ctx = ParallelContext.single()
    if tensor > 1:
        ctx = ParallelContext.from_world(tensor=tensor, sequence_parallel=sequence_parallel)
    model = _model(ctx=ctx).train()
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
    _, manager = _managed()
    with assert_refused(*parts):
        call(manager)


def test_what_cannot_be_adapted_is_refused():
    gelu = CONFIG.model_copy(update={"ffn_activation": "gelu"})
    with assert_refused("target", value="'gate_proj'", constraint="layer", remedy="q_proj"):
        LoRAManager(_model(gelu), targets=["gate_proj"]).inject()
    with assert_refused(
        "lora_targets",
        value=["gate_proj"],
        constraint=("ffn_activation=swiglu", "gelu"),
        remedy="remove",
    ):
        DariaFormerConfig(lora_rank=2, lora_targets=["gate_proj"], ffn_activation="gelu")
    with assert_refused(
        "LoRA", value="torch.nn.modules.linear.Bilinear", constraint="linear", remedy="lora_rank=0"
    ):
        wrap(nn.ModuleDict({"q_proj": nn.Bilinear(2, 2, 2)}), LORA_TARGETS, **_SMALL)
    with assert_refused(
        "q_proj", value=(3, 2.0, 0.2), constraint="(16, 32.0, 0.0)", remedy="configuration"
    ):
        LoRAManager(_model(NATIVE)).inject()
    pathless = _model(CONFIG.model_copy(update={"paths": ("local",)}))
    _, manager = _managed(pathless)
    with assert_refused(
        "weight", value="'persona'", constraint="persona path", remedy=("paths", "number")
    ):
        manager.activate_adapter("first", weight="persona")
    plain = LoRAManager(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), targets=["q_proj"])
    plain.inject()
    with assert_refused("weight", value="'esv'", constraint="blocks", remedy="number"):
        plain.activate_adapter("x", weight="esv")


_SMALL = {"rank": 2, "alpha": 1.0, "dropout": 0.0}
