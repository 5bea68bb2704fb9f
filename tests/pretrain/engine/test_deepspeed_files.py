from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.checkpoint.errors import CheckpointError
from parallel.cpu.compat import prepare_deepspeed, prepare_environment
from pretrain.engine.deepspeed_files import load_engine_state, save_engine_state
from tests.distributed import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**9,
}


@pytest.fixture(scope="module", autouse=True)
def _import_deepspeed_before_forking() -> None:
    prepare_environment()
    import deepspeed  # noqa: F401


def build_engine() -> Any:
    import deepspeed

    prepare_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]


def step(engine: Any) -> float:
    loss = engine(torch.ones(2, 4)).square().sum()
    engine.backward(loss)
    engine.step()
    return loss.item()


def save_and_report(directory: Path) -> tuple[list[str], list[float]]:
    engine = build_engine()
    step(engine)
    written = save_engine_state(engine, directory, client_state={"note": 1})
    losses = [step(engine) for _ in range(2)]
    return [path.name for path in written], losses


def load_and_go_on(directory: Path) -> tuple[int, list[float]]:
    engine = build_engine()
    client_state = load_engine_state(engine, directory)
    return client_state["note"], [step(engine) for _ in range(2)]


def test_every_file_is_claimed_by_the_rank_that_wrote_it_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    reports = run_ranks(save_and_report, 2, tmp_path)

    claimed = [name for names, _ in reports for name in names]
    assert sorted(claimed) == sorted(os.listdir(tmp_path / "engine"))
    assert len(reports[0][0]) == 2  # model states and its optimizer shard
    assert len(reports[1][0]) == 1  # its optimizer shard
    assert os.listdir(tmp_path) == ["engine"]  # neither scripts nor `latest`
    assert run_ranks(load_and_go_on, 2, tmp_path) == [(1, losses) for _, losses in reports]


def save_on_a_full_disk(directory: Path) -> str:
    engine = build_engine()
    if dist.get_rank() == 1:
        original = engine.checkpoint_engine.save

        def save(state_dict: Any, path: str) -> None:
            original(state_dict, path)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

        engine.checkpoint_engine.save = save
    try:
        save_engine_state(engine, directory)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_full_disk_on_one_rank_is_told_after_all_ranks_have_left_the_save(tmp_path: Path) -> None:
    first, second = run_ranks(save_on_a_full_disk, 2, tmp_path, timeout=60.0)
    assert first == "saved"
    assert "unexpected pos 64" in second
    assert f"{tmp_path}/engine/zero_pp_rank_1_mp_rank_00_optim_states.pt' cannot be" in second


def load_from_nothing(directory: Path) -> str:
    engine = build_engine()
    try:
        load_engine_state(engine, directory)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_loading_where_there_is_nothing_is_an_error(tmp_path: Path) -> None:
    (message,) = run_ranks(load_from_nothing, 1, tmp_path)
    assert "holds no DeepSpeed checkpoint" in message
