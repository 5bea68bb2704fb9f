"""Complete runs of a family with state in its carry: the same at every layout, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.convert import to_hf
from models.daria_former import DariaFormerForCausalLM
from parallel.carry import SequentialModel
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run
from tests.tiers import tiered
from tests.tolerance import BF16_LOSS, FP32_LOSS, FP32_NORM, FP64

# All slots of memory are retrieved: a choice among them that is close may fall differently at
# another layout, and the runs part (with 3 of 11, in the third step, by 1e-4 instead of 1e-7).
MODEL = {**CASES["daria_former"].config.model_dump(), "memory_top_k": 11}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "data 2, ZeRO-3": (2, 3, {"training__batch_size": 2}),
    "tensor 2, sequence parallel": (
        2, 1, {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    ),
    "pipeline 4, recomputed": (
        4, 1, {"parallel__pipeline": 4, "training__activation_recomputation": "full"},
    ),
    "pipeline 2 x tensor 2 x data 2": (
        8, 1, {"parallel__pipeline": 2, "parallel__tensor": 2, "training__batch_size": 2},
    ),
}  # fmt: skip


def _train(data: Path, directory: Path, world_size: int, stage: int, **changes: Any):
    changes = {"model": MODEL, **changes}
    config = tiny_run(data, run_dir=str(directory / "run"), **changes)
    codes = run_ranks(run_training, world_size, config, f"configs/ds/zero{stage}.json", init=False)
    assert codes == [0] * world_size
    return metrics(config)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    return _train(data, tmp_path_factory.mktemp("reference"), 1, 0)


@pytest.mark.parametrize(
    "layout", tiered(LAYOUTS, ["data 2, ZeRO-3", "pipeline 2 x tensor 2 x data 2"])
)
def test_a_run_is_the_same_at_any_layout(layout, data, reference, tmp_path):
    world_size, stage, changes = LAYOUTS[layout]
    trained, evaluated = _train(data, tmp_path, world_size, stage, **changes)
    for name, tolerance in (
        ("loss", FP32_LOSS),
        ("memory_loss", FP32_NORM),
        ("grad_norm", FP32_NORM),
    ):
        expected = [record[name] for record in reference[0]]
        assert [record[name] for record in trained] == pytest.approx(expected, rel=tolerance)
    assert evaluated[-1]["eval_loss"] == pytest.approx(reference[1][-1]["eval_loss"], rel=FP32_LOSS)
    _check_export(tmp_path)


@torch.no_grad()
def _check_export(directory: Path) -> None:
    """A checkpoint of any layout gives the same logits in transformers."""
    to_hf(directory / "run", directory / "hf", with_tokenizer=False)
    exported = DariaFormerForCausalLM.from_pretrained(directory / "hf", dtype=torch.float64)
    model = load_model(open_checkpoint(directory / "run"), device="cpu").double()
    tokens = torch.arange(40).reshape(2, 20) % model.specs[0].kwargs["config"].vocab_size
    expected = model(TokenInputs(tokens)).logits.transpose(0, 1)
    torch.testing.assert_close(exported(tokens).logits, expected, **FP64)


def test_bf16_follows_fp32(data, reference, tmp_path):
    trained, _ = _train(data, tmp_path, 2, 1, parallel__pipeline=2, training__precision="bf16")
    expected = [record["loss"] for record in reference[0]]
    assert [record["loss"] for record in trained] == pytest.approx(expected, rel=BF16_LOSS)


def test_packed_documents_train_in_a_pipeline(data, tmp_path):
    apart = {"data__reset_at_documents": True, "training__max_steps": 2}
    whole, _ = _train(data, tmp_path / "whole", 1, 0, **apart)
    cut, _ = _train(data, tmp_path / "cut", 2, 1, parallel__pipeline=2, **apart)
    expected = [record["loss"] for record in whole]
    assert [record["loss"] for record in cut] == pytest.approx(expected, rel=FP32_LOSS)


def test_a_run_can_train_adapters_alone(data, tmp_path):
    model = CASES["daria_former_lora"].config.model_dump()
    frozen = {"model": model, "training__lr_multipliers": {"": 0.0, ".lora.": 1.0}}
    # In the second step those move, too, whose gradient is zero while their product is.
    short = {"training__max_steps": 2, "training__gradient_accumulation_steps": 1}
    cut = {"parallel__pipeline": 2, "parallel__tensor": 2}
    _train(data, tmp_path, 4, 1, **cut, **short, **frozen)
    trained = load_model(open_checkpoint(tmp_path / "run"), device="cpu")
    before = SequentialModel(trained.specs, trained.ctx, seed=tiny_run(data).training.seed)
    initial = dict(before.named_parameters())
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, initial[name])}
    assert moved == {name for name in initial if ".lora." in name}
