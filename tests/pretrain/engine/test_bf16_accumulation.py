"""Sums of bf16 gradients in fp32: the bits of DeepSpeed's own, for fewer bytes."""

from __future__ import annotations

from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from pretrain.distributed.process_groups import process_group
from pretrain.engine import build
from pretrain.engine.train_spec import Targets
from tests.benchmarks.training import random_batch, run_config, start_engine
from tests.distributed import run_ranks
from tests.pretrain.engine.ds_options import LAYOUTS, Trained, config_of, train
from tests.pretrain.tiny_run import write_data

STOCK = {"bf16.immediate_grad_update": False}
MODEL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("layout", ["ZeRO-1 DP2", "PP2"])
def test_sums_and_what_follows_have_the_bits_of_deepspeeds_own(layout, tmp_path, monkeypatch):
    """With a tied matrix, which has two gradients, and clipping; two micro-batches a step."""
    write_data(tmp_path)
    config = config_of(LAYOUTS[layout], "bf16", tmp_path, experts=False)
    assert config.training.gradient_accumulation_steps == 2
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    file = LAYOUTS[layout].file({})
    ours = train(config, {"ours": file}, tmp_path / "a")["ours"]
    monkeypatch.setattr(build, "add_gradients_in_place", lambda optimizer: None)
    stock = train(config, {"stock": LAYOUTS[layout].file(STOCK)}, tmp_path / "b")["stock"]
    assert isinstance(ours, Trained)
    assert isinstance(stock, Trained)
    assert ours[:2] == stock[:2]
    masters, expected = ours.masters(), stock.masters()
    assert masters.keys() == expected.keys()
    for name, master in expected.items():
        assert torch.equal(masters[name], master), name


class _Bytes(TorchDispatchMode):
    """Bytes that operations read and write, where each takes its operands from memory."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name.startswith("_foreach"):  # in place; returns nothing
            written = given
        storages = {x.untyped_storage().data_ptr() for x in given}
        is_in_place = name.endswith("_") and not name.startswith("__")
        if not is_in_place and any(x.untyped_storage().data_ptr() in storages for x in written):
            return out  # a view
        if "zero_" in name or "fill_" in name:
            given = []
        elif name == "copy_":
            given = given[1:]
        self.total += sum(x.numel() * x.itemsize for x in (*given, *written))
        return out


def _measured(file: str | None, *, stock: bool) -> float:
    """Bytes per parameter that the sums of gradients cost beside the backward pass itself."""
    if stock:
        build.add_gradients_in_place = lambda optimizer: None
    config = run_config(
        MODEL, seq_length=16, batch_size=1, precision="bf16", gradient_accumulation_steps=3
    )
    with process_group() as device:
        engine = start_engine(config, device=device, ds_config=file)
        inner, counted = engine._deepspeed, []
        for _ in range(2):  # the second has what the first leaves behind
            batch = random_batch(config, seed=1)
            total, _ = engine.spec.objective(
                inner(TokenInputs(batch.tokens)), Targets(batch.labels)
            )
            with _Bytes() as spent:
                inner.backward(total)
            counted.append(spent.total)
            inner.step()
        batch = random_batch(config, seed=1)
        total, _ = engine.spec.objective(
            engine.module(TokenInputs(batch.tokens)), Targets(batch.labels)
        )
        parameters = [p for p in engine.module.parameters() if p.requires_grad]
        with _Bytes() as bare:
            torch.autograd.grad(total, parameters)
        number = sum(p.numel() for p in parameters)
    return (counted[1] - bare.total) / number


def test_a_micro_batch_moves_10_bytes_per_parameter_and_26_in_deepspeeds_own(tmp_path: Path):
    stock = tmp_path / "stock.json"
    stock.write_text(
        '{"zero_optimization": {"stage": 1}, "bf16": {"immediate_grad_update": false}}'
    )
    [ours] = run_ranks(_measured, 1, None, stock=False, init=False)
    [theirs] = run_ranks(_measured, 1, str(stock), stock=True, init=False)
    print(f"bytes per parameter and micro-batch: {ours:.2f}, DeepSpeed's own {theirs:.2f}")
    assert ours == pytest.approx(10, abs=0.2)
    assert theirs == pytest.approx(26, abs=0.2)
