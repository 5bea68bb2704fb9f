"""LoRA of PEFT beside the memory."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import models.amrpa as amrpa
from models.amrpa import get_amrpa_metrics, inject_amrpa
from tests.models.amrpa.tiny import inputs, plain
from tests.refusals import assert_refused
from tests.tolerance import FP64

TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"]}


def _fresh(name: str):
    config = amrpa.AMRPAConfig(target_layers="all", alpha_mlp_hidden=12, memory_noise=0.0)
    return inject_amrpa(plain(name).double(), config)


def _adapted(name: str):
    lora = LoraConfig(target_modules=TARGETS[name], modules_to_save=["amrpa"])
    return get_peft_model(_fresh(name), lora).eval()


@torch.no_grad()
def _logits(model, name: str) -> torch.Tensor:
    return model(**inputs(name)).logits


def _train(model, name: str, *, steps: int) -> None:
    """Large steps: W_a, W_g and the MLP get a gradient once W_m is not 0."""
    given = inputs(name)
    labels = given.get("decoder_input_ids", given["input_ids"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**given, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_and_memory_train_are_saved_merged_and_loaded(name, tmp_path):
    model = _adapted(name)
    with torch.no_grad():
        assert torch.equal(_logits(model, name), _logits(plain(name).double(), name))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".amrpa." not in n} == {n for n in trained if "lora_" in n}
    memory = {n for n, _ in _fresh(name).named_parameters() if ".amrpa." in n}
    assert len([n for n in trained if ".amrpa." in n]) == len(memory)

    _train(model, name, steps=2)
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert (get_amrpa_metrics(model)["memory_contribution"] > 0).all()
    expected = _logits(model, name)
    with model.disable_adapter():
        assert torch.equal(_logits(model, name), _logits(plain(name).double(), name))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(_fresh(name), tmp_path / "adapter").double().eval()
    torch.testing.assert_close(_logits(loaded, name), expected, **FP64)

    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(_logits(merged, name), expected, **FP64)
    assert {n for n, _ in merged.named_parameters()} == {
        n for n, _ in _fresh(name).named_parameters()
    }
    merged.save_pretrained(tmp_path / "merged")
    again = amrpa.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logits(again, name), expected, **FP64)


def test_linear_layers_are_adapted_and_the_memory_is_not():
    model = get_peft_model(_fresh("llama"), LoraConfig(target_modules="all-linear"))
    names = [n for n, _ in model.named_parameters() if ".amrpa." in n]
    assert names
    assert not any("lora" in n for n in names)


def test_an_adapted_model_is_refused():
    model = get_peft_model(plain("t5"), LoraConfig(target_modules=["q"]))
    with assert_refused(
        "model", value="PeftModel", constraint="PreTrainedModel", remedy=("first", "adapters")
    ):
        inject_amrpa(model)
