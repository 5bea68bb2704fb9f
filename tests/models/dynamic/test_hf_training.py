"""The exported models in transformers' Trainer, and in processes that train together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from models.base import TokenInputs
from models.dynamic import ThresholdUpdates
from tests.distributed import run_ranks
from tests.models.dynamic.exports import CLASSES, TOKENS, VOCAB_SIZE
from tests.models.families import CASES
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


def _stepped(case: str, folder: Path, batch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step of transformers' Trainer over four rows, and its gradients: fp64.

    The rows score 1, 6, 11 and 20 tokens and have padding before and after their tokens.
    """
    tokens = torch.randint(0, 61, (4, 21), generator=torch.Generator().manual_seed(3))
    scored = torch.arange(21) >= torch.tensor([[20], [15], [10], [0]])
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[3, 17:] = 0, 0
    labels = tokens.masked_fill(~scored | (mask == 0), -100)
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
    loss = Trainer(model, arguments, train_dataset=rows).train().training_loss
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


def test_the_trainer_of_transformers_trains_saves_and_goes_on(exported, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }

    def train(name: str, steps: int, **resume: str) -> dict[str, torch.Tensor]:
        model = exported.loaded(dtype=torch.float32)
        arguments = TrainingArguments(str(tmp_path / name), max_steps=steps, **options)
        callbacks = [ThresholdUpdates()]
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train(**resume)
        return model.state_dict()

    whole = train("whole", 4)
    continued = train("part", 4, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    before = exported.loaded(dtype=torch.float32).state_dict()
    for name, tensor in whole.items():
        assert torch.equal(continued[name], tensor), name
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
