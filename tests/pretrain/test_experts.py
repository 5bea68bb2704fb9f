"""Complete runs with experts: any expert size equals one process, saved and continued."""

from __future__ import annotations

from pathlib import Path

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models import registry
from pretrain.config import RunConfig
from pretrain.loop import run as run_training
from tests.distributed import run_ranks
from tests.pretrain.tiny_run import SEQ, metrics, tiny_run, write_data

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def family():
    """The mixture family among the registered ones."""
    entry = registry._Entry("tests.models.mixture", "MixtureConfig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._FAMILIES, "mixture", entry)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_data(directory)
    return directory


def _config(data: Path, run_dir: Path, **changes) -> RunConfig:
    model = {"family": "mixture", "max_position_embeddings": SEQ, "init_std": 0.1}
    model |= {
        name: changes.pop(name) for name in ("capacity_factor", "z_weight") if name in changes
    }
    options = {"training__max_steps": STEPS, "run_dir": str(run_dir)}
    return tiny_run(data, **options, model=model, **changes)


def _train(config: RunConfig, world_size: int = 1, *, stage: int = 1) -> list:
    codes = run_ranks(run_training, world_size, config, f"configs/ds/zero{stage}.json", init=False)
    assert codes == [0] * world_size
    trained, evaluated = metrics(config)
    return trained + evaluated


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    return {
        factor: _train(
            _config(data, tmp_path_factory.mktemp("one"), capacity_factor=factor), stage=0
        )
        for factor in (None, 0.75)
    }


LAYOUTS = {
    "expert 2, ZeRO-1": (2, 1, {}),
    "expert 2, ZeRO-2": (2, 2, {}),
    "expert 2 of data 4": (4, 1, {"training__batch_size": 1}),
    "tensor 2 x expert 2": (4, 1, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
    "pipeline 2 x expert 2": (4, 1, {"parallel__pipeline": 2}),
}


@pytest.mark.parametrize("factor", [None, 0.75])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_at_any_expert_size_equals_one_process(layout, factor, data, reference, tmp_path):
    world_size, stage, changes = LAYOUTS[layout]
    changes = {"training__batch_size": 2, "parallel__expert": 2} | changes
    config = _config(data, tmp_path, capacity_factor=factor, **changes)
    records = _train(config, world_size, stage=stage)
    for record, expected in zip(records, reference[factor], strict=True):
        for name in ("loss", "balance_loss", "z_loss", "grad_norm", "eval_loss"):
            if name in expected:
                assert record[name] == pytest.approx(expected[name], rel=1e-4), (name, record)
