"""The z-loss of the head: the equation's value and every gradient, however a step is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading.batch import IGNORED_LABEL
from models.base import TokenInputs
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.config import ConfigError
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine import train_spec as spec_module
from pretrain.engine.train_spec import TrainSpec, check_model
from pretrain.run_data import open_training_data
from tests.distributed import run_ranks
from tests.pretrain.first_step import first_step
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run
from tests.refusals import assert_refused

SAMPLES, Z_LOSS = 8, 0.05

# world size, ZeRO stage, gradient accumulation, other settings
CUTS = {
    "one micro-batch": (1, 0, 1, {}),
    "data 2, accumulation 2, ZeRO-2, parts": (2, 2, 2, {"training__logits_parts": 4}),
    "pipeline 2, accumulation 4": (2, 1, 4, {"parallel__pipeline": 2}),
    "tensor 2, accumulation 2": (2, 1, 2, {"parallel__tensor": 2}),
    "pipeline 2 x tensor 2, parts": (
        4, 1, 2, {"parallel__pipeline": 2, "parallel__tensor": 2, "training__logits_parts": 2},
    ),
}  # fmt: skip


def _config(data: Path, world_size: int, accumulation: int, **changes):
    model_size = changes.get("parallel__pipeline", 1) * changes.get("parallel__tensor", 1)
    return tiny_run(
        data,
        data__reset_at_documents=True,  # so that micro-batches score different numbers of tokens
        training__batch_size=SAMPLES * model_size // accumulation // world_size,
        training__gradient_accumulation_steps=accumulation,
        training__grad_clip=1e9,
        training__z_loss=Z_LOSS,
        **changes,
    )


@pytest.fixture(scope="module")
def expected(data) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Eager equations on logits in fp64, all samples of the step at once."""
    config, ctx = _config(data, 1, 1), ParallelContext.single()
    specs = get_family("llama").layer_specs(config.model, segmented=True)
    model = SequentialModel(specs, ctx, seed=config.training.seed)
    with open_training_data(config, ctx.data) as loader:
        batch = next(loader)
    logits = model(TokenInputs(batch.tokens, batch.segment_ids)).transpose(0, 1).double()
    log_z = logits.exp().sum(dim=-1).log()
    scored = batch.labels != IGNORED_LABEL
    assert len(set(scored.sum(dim=1).tolist())) > 1
    own = logits.gather(-1, batch.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    lm_loss, z_loss = (log_z - own)[scored].mean(), log_z[scored].square().mean()
    total = lm_loss + Z_LOSS * z_loss
    total.backward()
    terms = {"lm_loss": lm_loss.item(), "z_loss": z_loss.item()}
    return total.item(), terms, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradients_are_those_of_the_equation_at_every_cut(cut, data, expected):
    world_size, stage, accumulation, changes = CUTS[cut]
    config = _config(data, world_size, accumulation, **changes)
    loss, terms, gradients = expected
    seen = set()
    for found in run_ranks(first_step, world_size, config, stage, init=False):
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.terms == pytest.approx(terms, rel=1e-5)
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, msg=name)
        seen |= found.gradients.keys()
    assert seen == gradients.keys()


def test_it_is_part_of_the_training_loss_and_not_of_the_held_out_one(data, tmp_path):
    plain, with_z = (
        tiny_run(data, run_dir=str(tmp_path / str(z)), training__lr=1e-12, training__z_loss=z)
        for z in (0.0, 0.5)
    )
    for config in (plain, with_z):
        run_ranks(run_training, 1, config, init=False)
    (trained, evaluated), (trained_plain, evaluated_plain) = metrics(with_z), metrics(plain)
    assert "z_loss" not in trained_plain[0]
    for record in trained:
        assert record["loss"] == pytest.approx(record["lm_loss"] + 0.5 * record["z_loss"])
    assert evaluated[-1]["eval_loss"] == pytest.approx(evaluated_plain[-1]["eval_loss"], rel=1e-6)


def test_a_head_without_logits_is_refused(data, monkeypatch):
    config = tiny_run(data, training__z_loss=1e-4)
    spec = TrainSpec.of(
        config, resolve_ds_config(None, config, data_size=1), ParallelContext.single()
    )
    check_model(spec)
    monkeypatch.setattr(spec_module, "logits_of", lambda output: (output,))
    with assert_refused(
        "training.z_loss",
        value=0.0001,
        constraint="llama",
        remedy="training.z_loss=0",
        error=ConfigError,
    ):
        check_model(spec)
