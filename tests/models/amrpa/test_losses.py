"""Losses and measurements in models with other heads, masks and layers than language models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from models.amrpa import (
    AMRPAConfig,
    get_amrpa_loss,
    get_amrpa_metrics,
    inject_amrpa,
)
from models.amrpa.injection.memories import Memories
from tests.models.amrpa.tiny import ALL, VOCAB, injected, inputs, plain
from tests.tolerance import FP64

TOKENS = torch.randint(3, VOCAB, (2, 3, 10), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[0, 1, 7:] = 0
CHOICES = {"attention_mask": MASK, "input_ids": TOKENS * MASK}
SETTINGS = AMRPAConfig(
    target_layers="all", memory_noise=0.0, dropout=0.0, alpha_mlp_hidden=8, gate_reg_weight=1.0,
    diversity_weight=1.0, freeze_base_model=False, freeze_embeddings=False,
)  # fmt: skip


def _with_head(name: str, class_name: str, **changes: Any) -> Any:
    """A model with AMRPA and another head, in fp64, without dropout."""
    config = AutoConfig.for_model(name, **(ALL[name][1] | changes))
    torch.manual_seed(5)
    model = getattr(transformers, class_name)(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return inject_amrpa(model, SETTINGS).double().train()


@pytest.mark.parametrize(
    ("name", "class_name", "labels"),
    [
        ("bert", "BertForMultipleChoice", {"labels": torch.tensor([0, 2])}),
        ("modernbert", "ModernBertForMultipleChoice", {"labels": torch.tensor([0, 2])}),
        ("gpt2", "GPT2DoubleHeadsModel", {"labels": TOKENS}),
        ("bert", "BertForQuestionAnswering", {
            "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}),
        ("bert", "BertForSequenceClassification", {"labels": torch.tensor([1, 0])}),
    ],
)  # fmt: skip
def test_the_loss_of_any_head_holds_both_losses_also_in_a_tuple(name, class_name, labels):
    model = _with_head(name, class_name)
    given = CHOICES
    if "Choice" not in class_name and "Double" not in class_name:
        given = {key: value[:, 1] for key, value in CHOICES.items()}
    found = model(**given, **labels).loss
    added = get_amrpa_loss(model)
    assert added > 1e-3
    first = model(**given, **labels, return_dict=False)[0]
    torch.testing.assert_close(first, found, **FP64)
    torch.testing.assert_close(found - added, model.eval()(**given, **labels).loss, **FP64)


def test_the_padding_of_a_choice_is_no_part_of_the_losses():
    model = _with_head("bert", "BertForMultipleChoice")
    model(TOKENS[..., :7])
    expected = get_amrpa_loss(model)
    mask = torch.ones_like(TOKENS)
    mask[..., 7:] = 0
    model(TOKENS, attention_mask=mask)
    torch.testing.assert_close(get_amrpa_loss(model), expected, **FP64)


@torch.no_grad()
def test_the_mask_of_an_encoder_says_nothing_about_a_decoder_with_memory_alone():
    model = inject_amrpa(plain("bart"), SETTINGS, mode="decoder")
    given = inputs("bart")
    labels = given.pop("decoder_input_ids")
    model(**given, labels=labels)
    found = get_amrpa_metrics(model)
    model(**given, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels))
    for metric, value in get_amrpa_metrics(model).items():
        torch.testing.assert_close(found[metric], value, msg=metric)


def test_layers_that_are_dropped_in_training_do_not_count_as_using_memory():
    model = injected("opt", {"layerdrop": 0.5}).train()
    read: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Memories):
            module.register_forward_hook(lambda *_, n=name: read.append(n))
    shares = set()
    for seed in range(12):
        read.clear()
        torch.manual_seed(seed)
        given = inputs("opt")
        loss = model(**given, labels=given["input_ids"]).loss
        assert loss.isfinite()
        if not read:
            assert get_amrpa_loss(model) == 0
            continue
        share = get_amrpa_metrics(model)["using_memory"]
        torch.testing.assert_close(share, torch.full((2,), len(read) / 3))
        shares.add(len(read))
    assert len(shares) > 1
