"""A run saved at one layout goes on at another: its state bit for bit, then the same losses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import pretrain.engine.build
from pretrain.checkpointing.optimizer_shards import StoredOptimizer
from tests.pretrain.layouts.layout_runs import (
    LAYOUTS,
    SAVED,
    Origin,
    Runs,
    assert_same_state,
    begin_at_checkpoint,
    saved_again,
    tail,
    train,
    weights,
)
from tests.tolerance import BF16_LOSS, BF16_NORM, FP32_LOSS, FP32_NORM


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("origins"))


def assert_continues(runs: Runs, run_dir: Path, pair: Pair) -> None:
    origin = runs.origin(pair.family, pair.precision, pair.old)
    begin_at_checkpoint(origin, run_dir)
    config = runs.config(pair.family, pair.precision, pair.new, run_dir)
    train(config, LAYOUTS[pair.new], saved_again)

    assert_same_state(run_dir / "copy", run_dir / "checkpoints" / f"step_{SAVED}")
    curve, evaluation = tail(config)
    for expected, found in zip(origin.curve, curve, strict=True):
        assert found["step"] == expected["step"]
        assert found["tokens"] == expected["tokens"]
        assert found["lr"] == expected["lr"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=pair.loss)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=pair.norm)
    assert evaluation == pytest.approx(origin.evaluation, rel=pair.loss)
    expected_weights, found_weights = weights(origin.run_dir), weights(run_dir)
    # Of all weights at once: the gradient of a key's bias is rounding alone, and Adam scales it up.
    difference = torch.stack([(found_weights[n] - w).norm() for n, w in expected_weights.items()])
    size = torch.stack([w.norm() for w in expected_weights.values()])
    assert difference.norm() <= 10 * pair.loss * size.norm()


class Pair(NamedTuple):
    """A model, the layout that saves it and the layout that resumes it."""

    family: str
    precision: str
    old: str
    new: str

    @property
    def loss(self) -> float:
        return BF16_LOSS if self.precision == "bf16" else FP32_LOSS

    @property
    def norm(self) -> float:
        return BF16_NORM if self.precision == "bf16" else FP32_NORM

    def __str__(self) -> str:
        return f"{self.family} {self.precision} {self.old} to {self.new}"


PAIRS = [
    Pair("llama", "fp32", "PP2 TP2", "ZeRO-0"),
    Pair("llama", "fp32", "PP2 TP2", "PP4"),
    Pair("llama", "fp32", "PP2 TP2", "TP4"),
    Pair("llama", "fp32", "PP2 TP2", "TP2 SP"),
    Pair("llama", "fp32", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("llama", "fp32", "ZeRO-3 DP2", "ZeRO-1 DP2"),
    Pair("llama", "fp32", "ZeRO-3 DP2", "PP2 TP2"),
    Pair("llama", "fp32", "ZeRO-0", "ZeRO-1"),
    Pair("llama", "fp32", "ZeRO-0", "TP2 DP2 ZeRO-3"),
    Pair("llama", "bf16", "PP2 TP2", "ZeRO-1"),
    Pair("llama", "bf16", "PP2 TP2", "ZeRO-2 DP2"),
    Pair("llama", "bf16", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("llama", "bf16", "ZeRO-1", "PP2 DP2"),
    Pair("daria_former", "bf16", "ZeRO-2 DP2", "TP2"),
    Pair("mod", "fp32", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("mod", "bf16", "ZeRO-1", "PP2 TP2"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_run_goes_on_at_another_layout(pair, runs, tmp_path):
    assert_continues(runs, tmp_path, pair)


def all_pairs() -> Iterator[Pair]:
    kinds = (("llama", "fp32"), ("llama", "bf16"), ("daria_former", "fp32"), ("mod", "bf16"))
    for family, precision in kinds:
        for old, new in itertools.permutations(LAYOUTS, 2):
            places = (LAYOUTS[old], LAYOUTS[new])
            bf16_without_master = precision == "bf16" and any(p.stage == 0 for p in places)
            too_few_heads = family != "llama" and any(p.tensor == 4 for p in places)
            pair = Pair(family, precision, old, new)
            if not (bf16_without_master or too_few_heads or pair in PAIRS):
                yield pair


@pytest.mark.slow
@pytest.mark.parametrize("pair", all_pairs(), ids=str)
def test_a_run_goes_on_at_every_other_layout(pair, runs, tmp_path):
    assert_continues(runs, tmp_path, pair)


def frozen(factor: float):
    """`run` of a model with one layer that is not trained and begins `factor` times as large."""

    def entry(config, ds_config_path: str) -> int:
        after_each = pretrain.engine.build._after_each

        def freezing(spec, load_layer):
            finish = after_each(spec, load_layer)

            def freeze_and_finish(layer_spec, layer):
                if layer_spec.name == "block_1":
                    for parameter in layer.requires_grad_(False).parameters():
                        parameter.mul_(factor)
                finish(layer_spec, layer)

            return freeze_and_finish

        pretrain.engine.build._after_each = freezing
        return saved_again(config, ds_config_path)

    return entry


@pytest.mark.parametrize("new", ["PP2 TP2", "ZeRO-3 DP2"])
def test_frozen_parameters_come_from_the_weights(new, runs, tmp_path):
    old = runs.config("llama", "bf16", "ZeRO-1", tmp_path / "old")
    train(old, LAYOUTS["ZeRO-1"], frozen(2.0))
    begin_at_checkpoint(Origin(tmp_path / "old", [], 0.0), tmp_path / "new")
    train(runs.config("llama", "bf16", new, tmp_path / "new"), LAYOUTS[new], frozen(1.0))
    saved = tmp_path / "old" / "checkpoints" / "step_4"
    assert_same_state(tmp_path / "new" / "copy", saved)
    trained = StoredOptimizer(saved / "optimizer").names()
    assert not any(name.startswith("block_1") for name in trained)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_moves_into_host_memory(stage, runs, tmp_path):
    json_file = tmp_path / "offload.json"
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    json_file.write_text(json.dumps({"zero_optimization": zero}))
    origin = runs.origin("llama", "bf16", "ZeRO-1")
    begin_at_checkpoint(origin, tmp_path / "offloaded")
    offloaded = runs.config("llama", "bf16", "ZeRO-1 DP2", tmp_path / "offloaded")
    train(offloaded, LAYOUTS["ZeRO-1 DP2"], saved_again, ds_config_path=str(json_file))
    assert_same_state(tmp_path / "offloaded" / "copy", origin.run_dir / "checkpoints" / "step_4")
    losses = [record["loss"] for record in tail(offloaded)[0]]
    assert losses == pytest.approx([record["loss"] for record in origin.curve], rel=BF16_LOSS)
