"""Known faults of models that route tokens, none of them here."""

from __future__ import annotations

import math

import pytest
import torch

from models.base import TokenInputs
from models.dynamic.block import TokenPositions
from models.dynamic.carry import MOD_AUX
from models.dynamic.surprise import Criteria, Surprise, SurpriseRouter, moving_average
from models.dynamic.token_router import TokenRouter, top_k
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from parallel.layer_state import layer_state_owners, update_layer_states
from tests.equivalence import build
from tests.models.dynamic.cases import (
    CTX,
    SIZES,
    VARIANTS,
    config_of,
    evaluated,
    family_of,
    model_of,
    tokens_of,
)
from tests.tolerance import FP64

SEQ = 24


@torch.no_grad()
def _leaks(model: SequentialModel, tokens: torch.Tensor) -> list[bool]:
    """Of every token after the first: whether changing it and later ones changes an earlier logit.

    Asserts that it changes its own.
    """
    before, found = model(TokenInputs(tokens)).logits, []
    for position in range(1, SEQ):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % SIZES["vocab_size"]
        after = model(TokenInputs(changed)).logits
        found.append(not torch.equal(before[:position], after[:position]))
        assert not torch.equal(before[position:], after[position:])
    return found


@pytest.mark.parametrize("rule", ["threshold", "predictor", "aux"])
@pytest.mark.parametrize("variant", ["mod", "dtf linear"])
def test_no_token_changes_an_earlier_one_by_a_causal_rule_bit_for_bit(variant, rule):
    family, changes = VARIANTS[variant]
    tokens = tokens_of(SEQ, batch=2)
    model = evaluated(config_of(family, **changes | {"causal_router": rule}), tokens).double()
    assert not any(_leaks(model, tokens))


@pytest.mark.parametrize("variant", ["mod", "dtf"])
def test_the_k_best_of_a_row_do_look_ahead_so_their_score_is_no_likelihood(variant):
    family, changes = VARIANTS[variant]
    config = config_of(family, **changes | {"causal_router": "topk"})
    tokens = tokens_of(SEQ, batch=2)
    assert any(_leaks(evaluated(config, tokens), tokens))
    assert any(_leaks(model_of(config).train(), tokens))
    assert not family_of(config).causal_in_training


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mod", "dtf"])
def test_a_row_is_routed_alone_also_in_training(variant):
    model, tokens = model_of(config_of(variant)), tokens_of(SEQ, batch=4)
    together = model(TokenInputs(tokens)).logits
    for i in range(4):
        alone = model(TokenInputs(tokens[i : i + 1])).logits
        torch.testing.assert_close(alone[:, 0], together[:, i], **FP64)


def test_training_moves_the_scores_and_with_them_the_choice():
    config = config_of("mod", gate_fn="raw")
    model, tokens = model_of(config), tokens_of(SEQ + 1, batch=4)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    router = model.get_submodule("layer_1.router")
    chosen = []
    router.choice.tokens.register_forward_hook(lambda *args: chosen.append(args[-1].chosen))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        total, _ = family_of(config).loss(
            model(TokenInputs(inputs)), labels, config=config, ctx=CTX
        )
        optimizer.zero_grad()
        total.backward()
        assert router.score.weight.grad.abs().max() > 0
        optimizer.step()
    assert not torch.equal(chosen[0], chosen[-1])
    assert {int(mask.sum()) for mask in chosen} == {4 * SEQ // 2}


def test_random_scores_are_spread_evenly_and_differ_between_layers():
    config = config_of("mod", router_score="random", mod_every=1, mod_offset=0)
    model, tokens = model_of(config), tokens_of(SEQ, batch=4)
    masks = []
    for i in range(2):
        tokens_chosen = model.get_submodule(f"layer_{i}.router.choice.tokens")
        tokens_chosen.register_forward_hook(lambda *args: masks.append(args[-1].chosen))
    model(TokenInputs(tokens))
    share = (masks[0] & masks[1]).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.08)
    assert not (masks[0] == masks[0][0]).all()


def test_scores_stay_ordered_where_the_gate_is_one():
    criteria = Criteria(config_of("dtf"), ctx=CTX)
    for parameter in criteria.parameters():
        torch.nn.init.constant_(parameter, parameter.init.value)
    static = torch.linspace(60.0, 200.0, 16).unsqueeze(1)
    surprise = Surprise(static, torch.zeros_like(static), torch.ones_like(static))
    router = SurpriseRouter(config_of("dtf"), ctx=CTX)
    router.criteria = criteria
    router_scores = router.score_tokens(static, surprise, None).router_scores
    assert (router_scores.gate == 1.0).all()
    assert top_k(router_scores.scores.T.detach(), 4).tolist() == [[12, 13, 14, 15]]


@torch.no_grad()
def test_an_outlier_at_the_first_token_does_not_starve_those_after_it():
    window, length = 100, 200
    generator = torch.Generator().manual_seed(0)
    static = torch.rand((1, length), generator=generator) + 0.5
    static[0, 0] = 1e4
    positions = torch.arange(length)[None]
    average = moving_average(static, positions, window, skip_first=True)
    assert average[0, 1:].max() < 2.0
    poisoned = moving_average(static, positions, window, skip_first=False)
    assert poisoned[0, 1:window].min() > 50.0
    router = SurpriseRouter(config_of("dtf"), ctx=CTX)
    assert router.criteria is not None
    for parameter in router.criteria.parameters():
        torch.nn.init.constant_(parameter, parameter.init.value)
    surprise = Surprise(static.T, static.T, average.T)
    router_scores = router.score_tokens(static.T, surprise, None).router_scores
    chosen = router.choice.tokens(router_scores.scores, forced=positions == 0).chosen[0]
    assert chosen[0]
    assert 0.25 < chosen[1:window].float().mean() < 1.0


def test_the_moving_average_of_packed_documents_is_that_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    documents = [torch.rand((2, n), generator=generator) for n in (5, 1, 30)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents]).expand(2, -1)
    for skip_first in (False, True):
        packed = moving_average(torch.cat(documents, 1), positions, 7, skip_first=skip_first)
        apart = [
            moving_average(d, torch.arange(d.shape[1]).expand(2, -1), 7, skip_first=skip_first)
            for d in documents
        ]
        torch.testing.assert_close(packed, torch.cat(apart, dim=1))


def test_the_offset_of_the_criterion_never_leaves_what_has_a_logarithm():
    criteria = Criteria(config_of("dtf", router_score="ce"), ctx=CTX)
    for parameter in criteria.parameters():
        torch.nn.init.constant_(parameter, parameter.init.value)
    surprise = Surprise(torch.ones(4, 1), torch.ones(4, 1), torch.ones(4, 1))
    assert criteria(surprise)["s_ce"].sum() > 0  # o_ce = 1.025
    optimizer = torch.optim.SGD([criteria.log_o_ce], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        criteria(surprise)["s_ce"].sum().backward()
        optimizer.step()
    logits = criteria(surprise)["s_ce"]
    assert logits.isfinite().all()
    assert math.exp(criteria.log_o_ce.item()) > 0


def _gradients(loss: torch.Tensor, model: SequentialModel, part: str) -> list[bool]:
    parameters = [p for name, p in model.named_parameters() if part in name]
    assert parameters
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [g is not None and bool(g.abs().max() > 0) for g in found]


def test_the_cross_entropy_does_not_reach_the_prior_nor_the_prior_the_trunk():
    config, tokens = config_of("dtf"), tokens_of(SEQ + 1)
    model = model_of(config)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    output = model(TokenInputs(inputs))
    lm_loss = family_of(config).token_losses(output, labels, CTX).sum()
    prior_loss = output.aux.sum(dim=0)[len(MOD_AUX)]
    assert not any(_gradients(lm_loss, model, ".prior"))
    assert all(_gradients(lm_loss, model, ".criteria."))
    assert any(_gradients(prior_loss, model, ".prior"))
    assert not any(_gradients(prior_loss, model, ".block."))
    assert not any(_gradients(prior_loss, model, ".criteria."))


def test_the_predictor_learns_without_a_trace_in_the_model():
    config, tokens = config_of("mod", causal_router="predictor"), tokens_of(SEQ)
    model = model_of(config)
    aux = dict(zip(MOD_AUX, model(TokenInputs(tokens)).aux.sum(dim=0), strict=True))
    assert all(_gradients(aux["router_loss"], model, ".predictor."))
    assert not any(_gradients(aux["router_loss"], model, ".block."))
    assert not any(_gradients(aux["router_loss"], model, ".score."))


def _as_llama(name: str) -> str:
    """Our name of a parameter of the plain stack in the llama family."""
    return name.replace(".block.", ".").replace("layer_", "block_")


def _llama(seed: int) -> SequentialModel:
    shared = {k: v for k, v in SIZES.items() if k != "router_init_std"}
    settings = {"qkv_bias": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    config = LlamaConfig(**shared, **settings)
    return build(LLAMA.layer_specs(config), CTX, seed=seed, noise=0.2).double()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mod", "dtf"])
def test_at_capacity_one_it_is_the_plain_stack(variant):
    plain, tokens = _llama(3), tokens_of(SEQ, batch=2)
    weights = plain.state_dict()
    config = config_of(variant, capacity_gamma=1.0)
    model = model_of(config).eval()
    model.load_state_dict({name: weights[_as_llama(name)] for name in model.state_dict()})
    expected = plain(TokenInputs(tokens))
    torch.testing.assert_close(model(TokenInputs(tokens)).logits, expected, **FP64)
    cache = model.new_cache(2, SEQ)
    parts = [model(TokenInputs(p), cache).logits for p in tokens.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(parts), expected, **FP64)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mod", "dtf"])
def test_routed_layers_that_take_every_token_with_the_gate_one_are_plain_layers(variant):
    """What keeps the function of imported weights: the gate `st`, whose value is 1."""
    plain, tokens = _llama(3), tokens_of(SEQ, batch=2)
    weights = {
        name: value
        for i in range(SIZES["num_layers"])
        for name, value in _routed_names(variant, i, plain.state_dict()).items()
    }
    whole = {name: v for name, v in plain.state_dict().items() if not name.startswith("block_")}
    for gamma, everything in ((0.5, SEQ), (0.5, 1)):
        config = config_of(
            variant, capacity_gamma=gamma, gate_fn="st", capacity_multiple=everything
        )
        model = model_of(config)
        missing, unexpected = model.load_state_dict(weights | whole, strict=False)
        assert not unexpected
        assert all(".router." in name or ".prior" in name for name in missing)
        found, expected = model(TokenInputs(tokens)).logits, plain(TokenInputs(tokens))
        if everything == SEQ:
            torch.testing.assert_close(found, expected, **FP64)
        else:
            assert (found - expected).abs().max() > 0.01


def _routed_names(variant: str, layer: int, weights: dict) -> dict:
    """The weights of one llama block under the names of a model with routed layers."""
    routed = layer % 2 == 1
    part = "dynamic.block" if routed else "decision.block" if variant == "dtf" else "block"
    own = f"pair_{layer // 2}" if variant == "dtf" else f"layer_{layer}"
    prefix = f"block_{layer}."
    return {
        f"{own}.{part}.{name.removeprefix(prefix)}": value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mod", "dtf", "dtf random"])
def test_the_share_of_unseen_tokens_that_is_computed_is_gamma(variant):
    family, changes = VARIANTS[variant]
    changes = changes | {"causal_router": "threshold", "capacity_gamma": 0.25, "tau_momentum": 0.9}
    model = model_of(config_of(family, **changes))
    for seed in range(80):
        model(TokenInputs(tokens_of(64, batch=16, seed=seed)))
        update_layer_states(layer_state_owners(model), ctx=CTX)
    shares: dict[str, list[float]] = {}
    for name, module in model.eval().named_modules():
        if isinstance(module, TokenRouter):
            own = shares.setdefault(name, [])
            module.register_forward_hook(
                lambda *args, own=own: own.append(args[-1].fraction.mean().item())
            )
    # Untrained scores depend on little but token and position, so that one batch is not enough.
    for seed in range(1000, 1016):
        model(TokenInputs(tokens_of(64, batch=32, seed=seed)))
    assert len(shares) == 2
    for own in shares.values():
        assert sum(own) / len(own) == pytest.approx(0.25, rel=0.1)


def test_what_a_run_reports_tells_a_rule_that_never_chooses_from_one_that_is_right():
    config = config_of("mod", causal_router="predictor", capacity_gamma=0.125)
    model, tokens = model_of(config), tokens_of(64, batch=2)
    for name, parameter in model.named_parameters():
        if name.endswith("predictor.down"):
            torch.nn.init.constant_(parameter, 0.0)  # a logit of 0 is not above 0
    aux = dict(zip(MOD_AUX, model(TokenInputs(tokens)).aux.T.tolist(), strict=True))
    # It would be right about 87.5 % of the tokens.
    assert aux["causal_fraction"] == [0.0, 0.0]
    assert aux["causal_recall"] == [0.0, 0.0]


def test_places_say_where_documents_begin():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]], dtype=torch.int32)
    assert TokenPositions(positions, packed=True).document_starts.tolist() == [
        [True, False, False, True, False, True]
    ]
