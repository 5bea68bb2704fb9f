"""The exported models in transformers' Trainer, and in processes that train together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from models.base import TokenInputs
from models.dynamic import ThresholdUpdates
from tests.distributed import run_ranks
from tests.models.dynamic.hf.exports import CLASSES
from tests.models.families import CASES
from tests.models.hf.export_folder import TOKENS, VOCAB_SIZE
from tests.models.hf.trainer_runs import trained_and_resumed
from tests.tolerance import FP64


def test_the_loss_of_training_has_those_of_routers_and_priors(exported):
    model, whole = exported.loaded().train(), exported.double.train()
    output = whole(TokenInputs(TOKENS))
    following = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
    expected = exported.family.loss(output, following, config=exported.config, ctx=whole.ctx)
    assert expected.total != expected.terms["lm_loss"]
    loss = model(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss, expected.total, **FP64)
    half = model(TOKENS, labels=TOKENS, num_items_in_batch=torch.tensor(2 * 40)).loss
    torch.testing.assert_close(half, loss / 2, **FP64)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".router." in n)


def _trimmed(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch without the columns that are padding in all of its rows."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    used = batch["attention_mask"].any(dim=0)
    return {name: column[:, used] for name, column in batch.items()}


def _stepped(case: str, folder: Path, batch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step of transformers' Trainer over four rows, and its gradients: fp64.

    The rows score 1, 6, 11 and 20 tokens and have padding before and after their tokens, in every
    batch no more than its longest row needs.
    """
    tokens = torch.randint(0, 61, (4, 21), generator=torch.Generator().manual_seed(3))
    router_scores = torch.arange(21) >= torch.tensor([[20], [15], [10], [0]])
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[3, 17:] = 0, 0
    labels = tokens.masked_fill(~router_scores | (mask == 0), -100)
    columns = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(4)]
    kind, config_kind = CLASSES[case.removesuffix("_experts")]
    heavy = {"router_z_loss_weight": 0.5, "causal_router": "predictor"}
    torch.manual_seed(5)
    config = config_kind.from_settings(CASES[case].config.model_copy(update=heavy))
    model = kind(config).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=4 // batch_size, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", use_cpu=True,
        disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=_trimmed)
    loss = trainer.train().training_loss
    return loss, {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", ["mod", "dtf", "mod_experts"])
def test_a_step_of_the_trainer_is_the_same_however_unequal_rows_are_accumulated(case, tmp_path):
    loss, gradients = _stepped(case, tmp_path, 4)
    for batch_size in (2, 1):
        own_loss, own = _stepped(case, tmp_path, batch_size)
        assert own_loss == pytest.approx(loss, rel=1e-6)  # the Trainer sums it in fp32
        for name, gradient in gradients.items():
            torch.testing.assert_close(own[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    assert all(gradient.any() for name, gradient in gradients.items() if ".predictor." in name)


THRESHOLD = {"routing_train": "threshold"}
ROWS = {
    "mod": {"causal_router": "aux"},
    "mod_variant": {},
    "mod_experts": {"expert_capacity_factor": 0.7, **THRESHOLD},
    "dtf": {"num_experts": 4, "expert_capacity_factor": 0.7, "causal_router": "predictor"},
    "dtf_variant": {"capacity_multiple": 4, **THRESHOLD},
}


def _padded(rows: list[torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Rows in one batch, with padding before every second one and after the others."""

    def together(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        free = [length - len(row) for row in rows]
        sides = [(n, 0) if i % 2 else (0, n) for i, n in enumerate(free)]
        pairs = zip(rows, sides, strict=True)
        return torch.stack([F.pad(row, side, value=value) for row, side in pairs])

    mask = together([torch.ones_like(row) for row in rows], 0)
    labels = together([F.pad(row[1:], (1, 0), value=-100) for row in rows], -100)
    return {"input_ids": together(rows, 7), "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_rows_train_as_alone_however_much_padding_they_have(case, recomputed):
    kind, config_kind = CLASSES[case.partition("_")[0]]
    heavy = {"router_z_loss_weight": 0.5, "expert_balance_loss_weight": 0.5, **ROWS[case]}
    torch.manual_seed(5)
    config = config_kind.from_settings(CASES[case].config.model_copy(update=heavy))
    tokens = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(3))
    rows = [tokens[0], tokens[1, :13], tokens[2, :6]]
    model = kind(config).double().train()
    model(tokens)  # so that a threshold leaves tokens out
    model.update_thresholds()

    def trained(batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
        own = copy.deepcopy(model)
        if recomputed:
            own.gradient_checkpointing_enable()
        router_scores = sum(len(row) - 1 for row in rows)
        losses = [own(**batch, num_items_in_batch=router_scores).loss for batch in batches]
        loss = torch.stack(losses).sum()
        loss.backward()
        own.update_thresholds()
        found = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        return loss.item(), found | dict(own.named_buffers())

    loss, alone = trained([_padded([row], len(row)) for row in rows])
    for batches in ([_padded(rows, 24)], [_padded(rows[:2], 31), _padded(rows[2:], 9)]):
        own_loss, own = trained(batches)
        assert own_loss == pytest.approx(loss, rel=1e-10)
        assert own.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_the_trainer_of_transformers_trains_saves_and_goes_on(exported, tmp_path):
    whole, resumed = trained_and_resumed(
        lambda: exported.loaded(dtype=torch.float32),
        TOKENS,
        tmp_path,
        callbacks=[ThresholdUpdates()],
    )
    before = exported.loaded(dtype=torch.float32).state_dict()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
        if name.endswith("tau"):
            assert not torch.equal(before[name], tensor), name


@torch.no_grad()
def _thresholds_of_a_step(model: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    rank, size = 0, 1
    if torch.distributed.is_initialized():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model.train()(rows[rank::size])
    model.update_thresholds()
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(("tau", "offset"))}


def test_processes_that_train_together_have_the_thresholds_of_all_their_rows(exported):
    rows = torch.randint(0, VOCAB_SIZE, (4, 21), generator=torch.Generator().manual_seed(2))
    expected = _thresholds_of_a_step(exported.loaded(), rows)
    models = exported.loaded()
    for found in run_ranks(_thresholds_of_a_step, 2, models, rows):
        for name, buffer in expected.items():
            torch.testing.assert_close(found[name], buffer, **FP64)
            assert not torch.equal(buffer, models.get_buffer(name)), name
