"""Generation with caches, beams and padding; training with the Trainer; saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import models.amrpa as amrpa
from models.amrpa import inject_amrpa
from tests.models.amrpa.tiny import ALL, DECODERS, PAIRS, VOCAB, injected, inputs, plain
from tests.refusals import assert_refused
from tests.tiers import spread
from tests.tolerance import assert_close, rounding

BOUND = rounding(torch.float32, depth=32, length=64)


def _cache(kind: str, model, length: int):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)  # keeps a window where a layer has one


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "history", "kind"), spread(DECODERS, ("qk", "context"), ("dynamic", "static"))
)
def test_decoding_with_a_cache_equals_the_full_forward_pass(name, kind, history):
    """In chunks, beyond the windows of mistral and gemma3."""
    model = injected(name, history_kind=history).double()
    tokens = inputs(name, padded=False)["input_ids"]
    whole = model(tokens).logits
    cache = _cache(kind, model, tokens.shape[1])
    parts = []
    for part in tokens.split([5, 1, 1, 3, 1, 1], dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(parts, dim=1), whole, BOUND)


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_with_an_encoder_decodes_with_a_cache(name):
    model = injected(name).double()
    given = inputs(name)
    whole = model(**given).logits
    cache = EncoderDecoderCache(
        DynamicCache(config=model.config), DynamicCache(config=model.config)
    )
    tokens = given.pop("decoder_input_ids")
    parts = [
        model(**given, decoder_input_ids=part, past_key_values=cache, use_cache=True).logits
        for part in tokens.split([4, 1, 1, 4], dim=1)
    ]
    assert_close(torch.cat(parts, dim=1), whole, BOUND)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    spread([*DECODERS, *PAIRS], ({}, {"num_beams": 3}, {"cache_implementation": "static"})),
)
def test_generation_is_the_same_with_and_without_a_cache(name, options):
    model = injected(name).double()
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "disable_compile": True,
    }
    plainly = {k: v for k, v in options.items() if k != "cache_implementation"}
    without = model.generate(**given, **settings, **plainly, use_cache=False)
    assert torch.equal(model.generate(**given, **settings, **options), without)
    if name in PAIRS or options:
        return
    alone = model.generate(given["input_ids"][:1, 3:], **settings)
    assert torch.equal(alone[0, -6:], without[0, -6:])  # left padding changes nothing


class _Rows(Dataset):
    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, VOCAB, (10,), generator=generator)
        labels = tokens.clone()
        labels[: index % 4 + 1] = -100
        return {"input_ids": tokens, "labels": labels}


def _train(name: str, folder, **options):
    model = injected(name, diversity_weight=0.5, gate_reg_weight=0.5)
    model = model.double()
    arguments = TrainingArguments(
        folder, max_steps=2, report_to=[], use_cpu=True, learning_rate=0.01, lr_scheduler_type=
        "constant", save_strategy="no", disable_tqdm=True, logging_steps=1, optim="sgd",
        max_grad_norm=0.0, **options,
    )  # fmt: skip

    class Ordered(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Ordered(model=model, args=arguments, train_dataset=_Rows(name))
    # Noise is drawn per micro-batch.
    for module in model.modules():
        if isinstance(module, amrpa.QueryMemory):
            module.eval()
            module.train = lambda mode=True, m=module: m
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _assert_trained(model, name: str) -> None:
    start = dict(injected(name).double().named_parameters())
    for parameter, value in model.named_parameters():
        if ".amrpa." in parameter:
            assert not torch.equal(value, start[parameter]), parameter


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_trainer_trains_both_losses_alike_in_any_micro_batches(name, tmp_path):
    whole, losses = _train(name, tmp_path, per_device_train_batch_size=4)
    parts, again = _train(
        name, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert losses == pytest.approx(again, rel=1e-5)
    _assert_trained(whole, name)
    for (parameter, value), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert_close(other.detach(), value.detach(), 1e-5, parameter, floor=1e-12)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_trainer_trains_encoders_and_pairs(name, tmp_path):
    # Not in micro-batches: transformers 5.23 then adds the losses of these models up, with or
    # without AMRPA, where it should average.
    model, losses = _train(name, tmp_path, per_device_train_batch_size=4)
    _assert_trained(model, name)
    assert losses[1] < losses[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_saved_model_loads_with_identical_logits(name, tmp_path):
    model = injected(name)
    model.save_pretrained(tmp_path)
    loaded = amrpa.from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    assert torch.equal(loaded(**inputs(name)).logits, model(**inputs(name)).logits)
    assert loaded.amrpa_state.config == model.amrpa_state.config


def test_a_model_with_memory_in_one_stack_loads(tmp_path):
    inject_amrpa(plain("bart"), target_layers=[1, 2], mode="decoder").save_pretrained(tmp_path)
    names = [n for n, _ in amrpa.from_pretrained(tmp_path).named_parameters() if ".amrpa." in n]
    assert names
    assert all("decoder" in n for n in names)


def test_a_bare_model_and_another_dtype_load(tmp_path):
    model = inject_amrpa(plain("llama").model, target_layers="last_2")
    model.save_pretrained(tmp_path)
    loaded = amrpa.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def _edit(folder, **changes):
    file = folder / "config.json"
    contents = json.loads(file.read_text())
    for name, value in changes.items():
        if isinstance(value, dict):
            contents[name] |= value
        else:
            contents[name] = value
    file.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"amrpa_config": {"memory_dcay": 1}},
         ("'memory_dcay'", "AMRPAConfig", "", "'memory_decay'")),
        ({"amrpa_config": {"alpha_mlp_hidden": 20}},
         ("mlp_weight_0", (12, 16), "(20, 16)", "configuration")),
        ({"amrpa_config": {"target_layers": [1]}},
         ("targets", "missing", "amrpa", "configuration")),
        ({"amrpa_config": []}, ("amrpa_config", "[]", "mapping", "to_dict")),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
         ("gate_weight", (4, 8, 8), "(8, 4, 4)", "configuration")),
        ({"head_dim": 16}, ("_proj.weight", "32", "(", "configuration")),
        ({"architectures": ["FooModel"]},
         ("architectures", "['FooModel']", "config.json", "class")),
        ({"architectures": None}, ("architectures", None, "config.json", "class")),
    ],
)  # fmt: skip
def test_a_directory_that_does_not_fit_is_refused_in_one_line(changes, parts, tmp_path):
    folder = tmp_path / "targets"
    injected("llama").save_pretrained(folder)
    _edit(folder, **changes)
    with assert_refused(*parts):
        amrpa.from_pretrained(folder)


def test_a_directory_without_memory_is_refused(tmp_path):
    plain("llama").save_pretrained(tmp_path / "plain")
    with assert_refused(str(tmp_path / "plain"), "amrpa_config", "config.json", "load"):
        amrpa.from_pretrained(tmp_path / "plain")
