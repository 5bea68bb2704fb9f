from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from models.daria_former.lora import LoRAManager, merged_state_dict, target_layers
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import Axis, ParallelContext
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from pretrain.equivalence import build
from tests.models.families import CASES

CONFIG = CASES["daria_former"].config
TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def model() -> SequentialModel:
    specs = FAMILY.layer_specs(CONFIG)
    return build(specs, ParallelContext.single(), seed=3, noise=0.1).eval()


def _logits(model) -> torch.Tensor:
    return model(TokenInputs(TOKENS)).logits


def _disturb(manager: LoRAManager, seed: int = 0) -> None:
    """Adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in manager.lora_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_a_layer_with_two_adapters_equals_the_dense_equation(kind):
    layer = torch.nn.ModuleDict({"q_proj": kind(6, 10, ctx=ParallelContext.single())})
    torch.nn.init.normal_(layer["q_proj"].weight)
    layer.config = CONFIG
    manager = LoRAManager(layer, rank=3, alpha=6, targets=["q_proj"])
    manager.inject()
    manager.add_adapter("more", rank=2, alpha=1)
    manager.activate_adapter("more", weight=0.5)
    _disturb(manager)
    layer.double()
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    lora = layer["q_proj"].lora.adapters
    weight = layer["q_proj"].weight + 6 / 3 * lora["default"].b @ lora["default"].a
    weight = weight + 0.5 * 1 / 2 * lora["more"].b @ lora["more"].a
    torch.testing.assert_close(layer["q_proj"](x), F.linear(x, weight))


def test_new_adapters_change_nothing(model):
    before = _logits(model)
    manager = LoRAManager(model, rank=4, alpha=8, targets=ALL)
    manager.inject()
    assert torch.equal(_logits(model), before)
    with pytest.warns(UserWarning, match="'another' is new"):
        manager.activate_adapter("another", weight=0.3)
    assert torch.equal(_logits(model), before)


def test_switching_stacking_and_coming_back(model):
    manager = LoRAManager(model, rank=2, targets=ALL)
    before = _logits(model)
    manager.inject()
    manager.add_adapter("a")
    _disturb(manager)
    first = _logits(model)
    manager.activate_adapter("a", weight=0.5)
    both = _logits(model)
    assert not torch.allclose(first, before)
    assert not torch.allclose(both, first)
    manager.deactivate_all_extras()
    assert torch.equal(_logits(model), first)
    manager.deactivate_adapter("default")
    assert torch.equal(_logits(model), before)


def test_merged_weights_compute_what_the_adapters_did(model):
    plain = copy.deepcopy(model)
    manager = LoRAManager(model, rank=2, targets=ALL)
    manager.inject()
    _disturb(manager)
    expected = _logits(model)
    state = merged_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(_logits(plain), expected, rtol=1e-4, atol=1e-4)
    manager.merge_all()
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="unmerge_all first"):
        manager.activate_adapter("default", weight=0.1)
    manager.unmerge_all()
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)


def test_freezing_the_base_leaves_exactly_the_adapters(model):
    manager = LoRAManager(model, rank=2, targets=["q_proj", "v_proj"])
    manager.inject()
    _disturb(manager)
    manager.freeze_base()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora." in n and "kappa" in n} | {
        n for n, _ in model.named_parameters() if n.endswith((".a", ".b"))
    }
    _logits(model).square().mean().backward()
    silent = [
        n for n, p in model.named_parameters()
        if p.requires_grad and "kappa" not in n and not p.grad.abs().max() > 0
    ]  # fmt: skip
    assert not silent
    assert manager.num_lora_parameters() == sum(p.numel() for p in manager.lora_parameters())
    manager.unfreeze_base()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["esv", "persona"])
def test_a_conditioned_adapter_follows_the_state_and_learns_how(model, kind):
    manager = LoRAManager(model, rank=2, targets=ALL)
    manager.inject()
    manager.activate_adapter("default", weight=kind)
    _disturb(manager)
    personas = torch.randn(2, 2, CONFIG.persona_dim)
    first, second = (model(DariaInputs(TOKENS, persona=p)).logits for p in personas)
    assert not torch.allclose(first, second)
    first.square().mean().backward()
    # The persona's slots are no tokens and have no state.
    named = {n: p for n, p in model.named_parameters() if n.endswith(f"kappa_{kind}")}
    kappas = [p for n, p in named.items() if ".persona." not in n]
    assert kappas
    assert all(p.grad.abs().max() > 0 for p in kappas)
    with pytest.raises(ValueError, match="changes with the text"):
        manager.merge_all()


def test_a_conditioned_adapter_decodes_as_in_the_full_pass(model):
    manager = LoRAManager(model, rank=2, targets=ALL)
    manager.inject()
    manager.activate_adapter("default", weight="esv")
    _disturb(manager)
    cache, parts = model.new_cache(2, 20), []
    with torch.no_grad():
        for token in TOKENS.split(1, dim=1):
            parts.append(model(TokenInputs(token), cache).logits)
        torch.testing.assert_close(torch.cat(parts), _logits(model), rtol=1e-4, atol=1e-4)


def test_every_target_of_every_block_is_found(model):
    names = [name for name, _ in target_layers(model, ["k_proj"])]
    assert len(names) == CONFIG.num_layers * len(CONFIG.all_paths)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: LoRAManager(m, targets=["qproj"]), "did you mean 'q_proj'"),
        (lambda m: LoRAManager(m, rank=0), "rank=0"),
        (lambda m: LoRAManager(m).deactivate_adapter("x"), "'x' is not known"),
        (lambda m: LoRAManager(m).activate_adapter("x", weight="mood"), "weight='mood'"),
        (lambda m: LoRAManager(m).unmerge_all(), "nothing is merged"),
    ],
)
def test_what_does_not_exist_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_dropout_is_refused_where_ranks_share_a_layer():
    config = CASES["daria_former_lora"].config.model_copy(update={"lora_dropout": 0.1})
    ctx = ParallelContext(tensor=Axis(2, 0, None))
    with pytest.raises(ValueError, match=r"lora_dropout=0.1 with parallel.tensor=2"):
        SequentialModel(FAMILY.layer_specs(config), ctx)
