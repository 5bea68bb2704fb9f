"""AMRPA in every architecture that it reaches."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CodeGenConfig, CodeGenForCausalLM

from models.amrpa import (
    AMRPAConfig,
    get_amrpa_loss,
    get_amrpa_metrics,
    inject_amrpa,
    reset_amrpa_history,
)
from models.amrpa.injection import attention as routing
from models.amrpa.injection.architectures import ARCHITECTURES, Architecture, Stack
from tests.models.amrpa.tiny import ALL, DECODERS, ENCODERS, PAIRS, injected, inputs, plain
from tests.refusals import assert_refused
from tests.tiers import spread
from tests.tolerance import assert_close, rounding

HISTORIES = ("qk", "pattern", "context")


def test_every_architecture_is_tested():
    assert {name.removesuffix("_groups") for name in ALL} == set(ARCHITECTURES)


@torch.no_grad()
@pytest.mark.parametrize(("name", "dtype"), spread(ALL, (torch.float32, torch.bfloat16)))
def test_injection_changes_no_bit_until_the_model_is_trained(name, dtype):
    model = plain(name).to(dtype)
    before = model(**inputs(name)).logits
    parameters = sum(p.numel() for p in model.parameters())
    assert inject_amrpa(model) is model
    assert torch.equal(model(**inputs(name)).logits, before)
    added = [p for n, p in model.named_parameters() if ".amrpa." in n]
    assert sum(p.numel() for p in model.parameters()) > parameters
    assert {p.dtype for p in added} == {dtype}
    assert (get_amrpa_metrics(model)["using_memory"] == 1).all()
    assert (get_amrpa_metrics(model)["memory_contribution"] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_remembered_patterns_are_the_weights_of_the_attention(name, monkeypatch):
    """Of transformers' own eager attention: masks, windows, position bias, scaling.

    Decoders without padding: on the left, eager attention in fp64 is NaN.
    """
    model, eager = plain(name), plain(name, attn_implementation="eager").double()
    model = inject_amrpa(model, target_layers="all").double()
    found: dict[str, list[torch.Tensor]] = {}
    remember = routing._remember

    def spy(module, site, query, key, output, mask, options):
        pattern = routing._pattern(module, query, key, mask, options)
        found.setdefault(site.stack.name, []).append(pattern)
        return remember(module, site, query, key, output, mask, options)

    monkeypatch.setattr(routing, "_remember", spy)
    given = inputs(name, padded=name not in DECODERS)
    model(**given)
    weights = eager(**given, output_attentions=True)
    # Norms and angles are fp32 inside of transformers.
    bound = rounding(torch.float32, depth=32, length=64)
    assert found.keys() == {stack.name for stack in model.amrpa_state.stacks}
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for stack, patterns in found.items():
        expected = getattr(weights, f"{stack}_attentions", None) or weights.attentions
        rows = slice(None) if stack == "decoder" and name in PAIRS else real
        for pattern, wanted in zip(patterns, expected, strict=False):
            assert_close(pattern.transpose(1, 2)[rows], wanted.transpose(1, 2)[rows], bound)


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (6, 9)])
def test_without_a_mask_the_mean_is_that_of_the_mask_that_says_the_same(
    queries, keys, causal, heads
):
    """(6, 9): a static cache with room left, or an encoder with more tokens than the decoder."""
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, 4 // heads
    q = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads, keys, 8, dtype=torch.float64)
    mask = torch.ones(queries, keys, dtype=torch.bool).expand(2, 1, -1, -1)
    if causal and queries > 1:
        mask = mask.tril()
    expected = routing._visible_mean(module, q, k, v, mask, {})
    assert_close(routing._visible_mean(module, q, k, v, None, {}), expected, 1e-10)


ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma3_text", "phi3", "olmo2")


@torch.no_grad()
@pytest.mark.parametrize("name", ROTARY)
def test_corrections_rotate_with_their_token(name):
    """All tokens moved by 7 positions: the same logits, also where part of a head rotates."""
    model, given = injected(name).double(), inputs(name, padded=False)
    moved = torch.arange(7, 7 + given["input_ids"].shape[1]).expand(2, -1)
    logits = model(**given).logits
    bound = rounding(torch.float32, depth=32, length=64)
    assert_close(model(**given, position_ids=moved).logits, logits, bound)


def _logits_and_gradients(name: str, changes=None, **settings):
    model = injected(name, changes, **settings).double()
    logits = model(**inputs(name)).logits
    real = torch.ones(2, logits.shape[1], dtype=torch.bool)
    if name not in PAIRS:
        real = inputs(name)["attention_mask"].bool()
    (logits[real].square().mean() + get_amrpa_loss(model)).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach()[real], gradients


@pytest.mark.parametrize("name", ALL)
def test_transported_values_are_those_of_the_stored_patterns(name):
    """qk = pattern with grouped heads, position bias, sliding windows, padding, shared layers; and
    every parameter of a memory gets a gradient."""
    logits, gradients = _logits_and_gradients(name, detach_history=False)
    expected, wanted = _logits_and_gradients(name, detach_history=False, history_kind="pattern")
    # Norms and angles are fp32 inside of transformers.
    bound = rounding(torch.float32, depth=32, length=64)
    assert_close(logits, expected, bound)
    assert gradients.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert_close(gradients[parameter], gradient, bound, parameter, floor=1e-9)
        assert ".amrpa." not in parameter or gradient.abs().max() > 0, parameter


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), spread(ALL, HISTORIES))
def test_a_batch_leaves_nothing_to_the_next_one(name, kind):
    model = injected(name, history_kind=kind)
    first = model(**inputs(name)).logits
    model(**inputs(name, length=7, seed=2))
    assert torch.equal(model(**inputs(name)).logits, first)
    reset_amrpa_history(model)
    assert torch.equal(model(**inputs(name)).logits, first)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_trained_memory_changes_the_logits_and_padding_changes_none(name):
    model = injected(name).double()
    given = inputs(name)
    logits = model(**given).logits
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("memory_weight"):
            parameter.zero_()
    assert not torch.allclose(model(**given).logits, logits, rtol=1e-3)
    if name in DECODERS:
        return  # learned positions count padding; see the tests of generation
    model = injected(name).double()
    short = {k: v[:1, :-3] if k != "decoder_input_ids" else v[:1] for k, v in given.items()}
    alone = model(**short).logits[0]
    bound = rounding(torch.float32, depth=32, length=64)
    assert_close(alone, logits[0, : len(alone)], bound)
    metrics = get_amrpa_metrics(model)
    model(**given)
    assert_close(metrics["gate_impact"], get_amrpa_metrics(model)["gate_impact"][:1], bound)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "training"), spread([*DECODERS, *PAIRS], HISTORIES, (False, True))
)
def test_no_later_token_is_seen(name, kind, training):
    model = injected(name, history_kind=kind, memory_noise=0.3).train(training)
    given = inputs(name, padded=False)
    key = "decoder_input_ids" if name in PAIRS else "input_ids"

    def logits(tokens):
        torch.manual_seed(0)
        return model(**given | {key: tokens}).logits

    tokens = given[key]
    before = logits(tokens)
    for position in (1, 4, 8):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1 - 3) % 50 + 3
        assert torch.equal(logits(changed)[:, :position], before[:, :position])
        assert not torch.equal(logits(changed)[:, position], before[:, position])


@pytest.mark.parametrize("name", [name for name in ALL if "albert" not in name])
def test_gradient_checkpointing_changes_nothing_even_with_two_passes_before_backward(name):
    def gradients(checkpointing: bool):
        model = injected(name).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        losses = []
        for seed in (1, 2):
            given = inputs(name, seed=seed)
            logits = model(**given, use_cache=False).logits if name not in ENCODERS else (
                model(**given).logits
            )  # fmt: skip
            losses.append(logits.square().mean() + get_amrpa_loss(model))
        sum(losses).backward()
        return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    losses, expected = gradients(False)
    again, found = gradients(True)
    # Not equal bits: transformers' T5 lays its position bias out differently there.
    torch.testing.assert_close(again, losses)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, msg=parameter)


def test_reentrant_checkpointing_is_refused():
    model = injected("llama").train()
    with assert_refused(
        "use_reentrant", value=True, constraint="gradient", remedy="use_reentrant=False"
    ):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_the_loss_of_training_holds_both_losses_and_that_of_evaluation_neither():
    model = injected("llama", memory_noise=0.0)
    given = inputs("llama") | {"labels": inputs("llama")["input_ids"]}
    alone = model(**given).loss
    output = model.train()(**given)
    torch.testing.assert_close(output.loss, alone + get_amrpa_loss(model))
    assert output.loss > alone
    first, _ = model(**given, return_dict=False)[:2]
    torch.testing.assert_close(first, output.loss)


def test_a_copy_of_a_model_has_a_memory_of_its_own():
    model = injected("llama").train()
    model(**inputs("llama")).logits.sum().backward()
    other = copy.deepcopy(model).eval()
    model.eval()
    expected = model(**inputs("llama")).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(**inputs("llama")).logits, expected)
    assert type(other).__name__ == "LlamaForCausalLM"


def test_layers_without_memory_and_embeddings_are_frozen():
    model = inject_amrpa(plain("bert"), target_layers="last_2")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    for part in ("encoder.layer.0.", "encoder.layer.1.", "embeddings.LayerNorm", "word_embeddings"):
        assert any(part in n for n in frozen), part
        assert not any(part in n for n in trainable), part
    for part in ("encoder.layer.2.", "encoder.layer.3.", "cls.predictions.transform", ".amrpa."):
        assert any(part in n for n in trainable), part
        assert not any(part in n for n in frozen), part
    free = inject_amrpa(
        plain("bert"), AMRPAConfig(freeze_base_model=False, freeze_embeddings=False)
    )
    assert all(p.requires_grad for p in free.parameters())


def test_the_configuration_of_the_caller_is_left_alone():
    config = AMRPAConfig(target_layers="last_2")
    model = inject_amrpa(plain("bert"), config, target_layers=[1])
    assert config == AMRPAConfig(target_layers="last_2")
    assert model.config.amrpa_config["target_layers"] == [1]


@torch.no_grad()
def test_models_that_share_a_configuration_are_injected_one_after_another():
    first = plain("llama")
    second = type(first)(first.config)
    inject_amrpa(first, target_layers=[1])
    before = second.eval()(**inputs("llama")).logits
    inject_amrpa(second, target_layers=[3])
    assert torch.equal(second(**inputs("llama")).logits, before)
    for model, layer in ((first, 1), (second, 3)):
        assert list(model.amrpa_state.stacks[0].plan.reads) == [layer]


def test_a_mode_or_a_prefix_restricts_injection_to_one_stack_and_freezes_the_other():
    trained = []
    for options in (
        {"mode": "decoder", "target_layers": "last_2"}, {"target_layers": "decoder:last_2"}
    ):  # fmt: skip
        model = inject_amrpa(plain("bart"), **options)
        names = {n for n, _ in model.named_parameters() if ".amrpa." in n}
        assert names
        assert all("decoder" in n for n in names)
        trained.append({n for n, p in model.named_parameters() if p.requires_grad})
    assert trained[0] == trained[1]
    assert not any(".encoder.layers." in n for n in trained[0])


@pytest.mark.parametrize(
    ("name", "changes", "options", "parts"),
    [
        ("llama", {"attn_implementation": "eager"}, {},
         ("attn_implementation", "'eager'", "AMRPA", "attn_implementation='sdpa'")),
        ("gpt2", {"reorder_and_upcast_attn": True}, {},
         ("reorder_and_upcast_attn", True, "AMRPA", "reorder_and_upcast_attn=False")),
        ("llama", {}, {"target_layers": [9]}, ("target_layers", [9], "0 to 3", "remove 9")),
        ("llama", {}, {"target_layers": "9:"}, ("target_layers", "'9:'", "4 layers", "choose")),
        ("llama", {}, {"target_layers": [0]}, ("target_layers", [0], "earlier", "deeper")),
        ("llama", {}, {"target_layers": "encoder:all"},
         ("target_layers", "'encoder:all'", ("'encoder'", "decoder"), "name")),
        ("bert", {}, {"mode": "decoder"},
         ("mode", "'decoder'", ("BertForMaskedLM", "encoder"), "mode")),
        ("bert", {}, {"mode": "both"},
         ("mode", "'both'", "'auto', 'encoder', 'decoder'", "choose")),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_injected_is_refused_and_left_alone(name, changes, options, parts):
    model = plain(name, **changes)
    before = model.state_dict().keys()
    with assert_refused(*parts):
        inject_amrpa(model, **options)
    assert model.state_dict().keys() == before
    assert not hasattr(model.config, "amrpa_config")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target_layers": 5}, ("target_layers", 5, ("string", "list"), "")),
        ({"config": {"dropout": 0.1}}, ("config", "{'dropout': 0.1}", "AMRPAConfig", "from_dict")),
        ({"config": AMRPAConfig(metric_device="gpu")},
         ("metric_device", "'gpu'", "torch", "'cpu'")),
        ({"adapter": ("foo", "self_attn")}, ("layers", "'foo'", "LlamaForCausalLM", "path")),
        ({"adapter": ("layers", "foo")}, ("attention", "'foo'", "layer", "path")),
        ({"adapter": ("layers", "self_attn", "foo")},
         ("num_heads", "'foo'", "LlamaConfig", "heads")),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(options, parts):
    if "adapter" in options:
        options = {"adapter": Architecture((Stack("decoder", *options["adapter"]),))}
    with assert_refused(*parts):
        inject_amrpa(plain("llama"), **options)


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_of_transformers_is_refused(model):
    with assert_refused("model", type(model).__name__, "PreTrainedModel", "first"):
        inject_amrpa(model)


def test_an_adapter_that_names_another_module_is_found_out_in_the_first_pass():
    wrong = Architecture((Stack("decoder", "layers", "mlp"),))
    model = inject_amrpa(plain("llama"), adapter=wrong)
    with assert_refused(
        "attention", "decoder", "AMRPA", "attn_implementation='amrpa'", error=RuntimeError
    ):
        model(**inputs("llama"))


def test_other_architectures_are_refused_with_the_list_of_those_that_work():
    model = CodeGenForCausalLM(
        CodeGenConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    )
    with assert_refused(
        "model_type",
        value="'codegen'",
        constraint=("bart, bert", "t5"),
        remedy="adapter=Architecture(",
    ):
        inject_amrpa(model)


def test_what_an_injected_model_cannot_do_is_refused():
    model = injected("llama")
    with assert_refused("LlamaForCausalLM", value="AMRPA", constraint="already", remedy="anew"):
        inject_amrpa(model)
    with assert_refused(
        "output_attentions", value=True, constraint="AMRPA", remedy="output_attentions=False"
    ):
        model(**inputs("llama"), output_attentions=True)
    with pytest.raises(ValueError, match="forward"):
        get_amrpa_metrics(model)
    model.set_attn_implementation("eager")
    with assert_refused(
        "attention",
        value="decoder",
        constraint="AMRPA",
        remedy="attn_implementation='amrpa'",
        error=RuntimeError,
    ):
        model(**inputs("llama"))
    with assert_refused("LlamaForCausalLM", value="AMRPA", constraint="no", remedy="inject_amrpa"):
        get_amrpa_loss(plain("llama"))
    silent = injected("llama", track_metrics=False)
    with assert_refused(
        "track_metrics", value=False, constraint="measurements", remedy="track_metrics=True"
    ):
        get_amrpa_metrics(silent)
