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
from parallel.checkpoint.manifest import MANIFEST_NAME, read_manifest
from pretrain.checkpointing.optimizer_shards import StoredOptimizer
from tests.distributed import run_ranks
from tests.pretrain.layouts.layout_runs import (
    LAYOUTS,
    SAVED,
    Origin,
    Reads,
    Runs,
    assert_same_state,
    begin_at_checkpoint,
    restored_and_counted,
    saved_again,
    tail,
    train,
    weights,
)
from tests.tolerance import BF16_LOSS, BF16_NORM, FP32_LOSS, FP32_NORM

THRESHOLDS = 2 * 4  # bytes of the buffers of the one routed layer in each half of mod
PADDING = 12 * 32  # bytes of the row that a vocabulary of 61 lacks on the second tensor rank


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
    Pair("llama", "fp32", "PP2 TP2", "TP4"),
    Pair("llama", "fp32", "ZeRO-3 DP2", "PP2 TP2"),
    Pair("llama", "fp32", "ZeRO-0", "TP2 DP2 ZeRO-3"),
    Pair("llama", "bf16", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("daria_former", "bf16", "ZeRO-2 DP2", "TP2"),
    Pair("mod", "fp32", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("mod_random_scores", "bf16", "ZeRO-1", "PP2 TP2"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_run_goes_on_at_another_layout(pair, runs, tmp_path):
    assert_continues(runs, tmp_path, pair)


def all_pairs() -> Iterator[Pair]:
    kinds = (
        ("llama", "fp32"),
        ("llama", "bf16"),
        ("daria_former", "fp32"),
        ("mod_random_scores", "bf16"),
    )
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


def restored(runs: Runs, run_dir: Path, new: str, *, with_index: bool = True) -> list[Reads]:
    """What every rank reads when the run of PP2 TP2 goes on at `new`; its state is that saved."""
    begin_at_checkpoint(runs.origin("mod", "fp32", "PP2 TP2"), run_dir)
    checkpoint = run_dir / "checkpoints" / f"step_{SAVED}"
    if not with_index:  # as an earlier version wrote it
        (checkpoint / "index.json").unlink()
        manifest = read_manifest(checkpoint)
        files = {n: entry for n, entry in manifest.files.items() if n != "index.json"}
        manifest = manifest.model_copy(update={"files": files})
        (checkpoint / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    config, place = runs.config("mod", "fp32", new, run_dir), LAYOUTS[new]
    json_file = f"configs/ds/zero{place.stage}.json"
    reads = run_ranks(restored_and_counted, 4, config, json_file, init=False)
    assert_same_state(run_dir / "copy", checkpoint)
    return reads


def test_a_rank_reads_its_own_elements_from_its_own_files(runs, tmp_path):
    """Elements that all tensor ranks hold are in the file of the first alone."""
    reads = restored(runs, tmp_path, "PP2 TP2")
    for rank, read in enumerate(reads):
        stage, tensor_rank = divmod(rank, 2)
        optimizer = [f"optimizer/rank_0000{owner}.safetensors" for owner in {2 * stage, rank}]
        weights = f"weights/pp_0{stage}_tp_0{tensor_rank}.safetensors"
        rng = f"rng/rank_0000{rank}.safetensors"
        assert read.opened == [*sorted(optimizer), weights, rng]
        assert read.optimizer_bytes == read.updated - PADDING * tensor_rank
        assert read.weight_bytes == THRESHOLDS


def test_at_another_layout_a_rank_opens_what_it_needs_once(runs, tmp_path):
    """Two data ranks update half of a stage each, in both of its files; a weight that all tensor
    ranks hold is in either."""
    for rank, read in enumerate(restored(runs, tmp_path, "PP2 DP2")):
        stage = rank // 2
        optimizer = [f"optimizer/rank_0000{2 * stage + i}.safetensors" for i in range(2)]
        assert read.opened == [*optimizer, f"weights/pp_0{stage}_tp_00.safetensors"]
        assert read.optimizer_bytes == read.updated
        assert read.weight_bytes == THRESHOLDS


def test_a_checkpoint_without_an_index_is_listed_by_rank_0_alone(runs, tmp_path):
    with_index = restored(runs, tmp_path / "with", "PP2 TP2")
    first, *others = restored(runs, tmp_path / "without", "PP2 TP2", with_index=False)
    assert others == with_index[1:]
    listed = first.opened[: -len(with_index[0].opened)]
    assert sorted(listed) == [
        *(f"optimizer/rank_0000{rank}.safetensors" for rank in range(4)),
        *(f"weights/pp_0{stage}_tp_0{rank}.safetensors" for stage in (0, 1) for rank in (0, 1)),
    ]
    assert first._replace(opened=first.opened[8:]) == with_index[0]


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
