"""DeepSpeed's own files, where only it can restore the optimizer: read without running them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parallel.cpu.compat import prepare_deepspeed, prepare_environment
from pretrain.config import to_yaml
from pretrain.engine.deepspeed_files import load_engine_state, save_engine_state
from tests.distributed import run_ranks
from tests.hostile.commands import Outcome, fault_of_refusal, train
from tests.hostile.payloads import payloads
from tests.hostile.surfaces import vouch_for
from tests.pretrain.tiny_run import metrics, tiny_run, write_data
from tests.tiers import tiered

# Whatever DeepSpeed pickles beside tensors is different at each of these.
LAYOUTS = {
    "ZeRO-0": {"zero_optimization": {"stage": 0}},
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    "ZeRO-2": {"zero_optimization": {"stage": 2}},
    "ZeRO-3": {"zero_optimization": {"stage": 3}},
    "ZeRO-1 in bf16": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "ZeRO-2 in bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "ZeRO-3 offloaded": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
}

ORDINARY = ("ZeRO-2", "ZeRO-1 in bf16")


def _engine(config: dict[str, Any]) -> Any:
    import deepspeed

    prepare_environment()
    prepare_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    common = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=common | config)[0]


def _step(engine: Any) -> float:
    dtype = next(engine.module.parameters()).dtype
    loss = engine(torch.ones(2, 4, dtype=dtype)).float().square().sum()
    engine.backward(loss)
    engine.step()
    return loss.item()


def _save_and_load(directory: Path, config: dict[str, Any]) -> tuple[list[float], list[float]]:
    engine = _engine(config)
    _step(engine)
    save_engine_state(engine, directory)
    expected = [_step(engine) for _ in range(2)]
    engine = _engine(config)
    load_engine_state(engine, directory)
    return expected, [_step(engine) for _ in range(2)]


@pytest.mark.parametrize("layout", tiered(LAYOUTS, ORDINARY))
def test_what_deepspeed_writes_is_read_without_unpickling_anything_else(
    tmp_path: Path, layout: str
) -> None:
    for expected, found in run_ranks(_save_and_load, 2, tmp_path, LAYOUTS[layout]):
        assert found == expected


def _resume(folder: Path) -> Outcome:
    return train("--config-dir", str(folder), "--config-name", "more")


def _faults(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """What was wrong with the refusal of each payload in the place of each file, with a manifest
    that vouches for it."""
    canary = folder / "canary"
    step = folder / "run" / "checkpoints" / "step_2"
    for number, name in enumerate(names):
        files = sorted((step / "engine").iterdir())
        file = files[number % len(files)]
        valid, manifest = file.read_bytes(), (step / "manifest.json").read_bytes()
        file.write_bytes(payloads(canary)[name])
        vouch_for(step)
        [outcome] = run_ranks(_resume, 1, folder, init=False)
        fault = fault_of_refusal(outcome, (str(file),), alone=False)
        if fault or canary.exists():
            yield f"{file.name} <- {name}: {'IT RAN' if canary.exists() else fault}"
        file.write_bytes(valid)
        (step / "manifest.json").write_bytes(manifest)


def _check(folder: Path, names: Sequence[str]) -> None:
    write_data(folder)
    changes = {"training__optimizer": "muon", "training__precision": "bf16"}
    for name, steps in (("first", 2), ("more", 4)):
        config = tiny_run(folder, training__max_steps=steps, **changes)
        (folder / f"{name}.yaml").write_text(to_yaml(config))
    arguments = ("--config-dir", str(folder), "--config-name", "first")
    assert run_ranks(train, 1, *arguments, init=False)[0].code == 0
    wrong = list(_faults(folder, names))
    print(f"{len(names)} forged files in the place of DeepSpeed's: {len(wrong)} not refused")
    assert wrong == []
    assert run_ranks(_resume, 1, folder, init=False)[0].code == 0, "with its own files it goes on"
    assert [record["step"] for record in metrics(config)[0]] == [1, 2, 3, 4]


def test_forged_files_in_the_place_of_deepspeeds_are_not_run(tmp_path: Path) -> None:
    _check(tmp_path, ["torch zip of a state", "torch tar"])


@pytest.mark.slow
def test_no_forged_file_in_the_place_of_deepspeeds_is_run(tmp_path: Path) -> None:
    _check(tmp_path, list(payloads(tmp_path / "canary")))
