"""Profiles of chosen steps: they change nothing, and say where the time goes."""

from __future__ import annotations

import gzip
import json
import resource
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.config import LoggingConfig, parse_config
from pretrain.config.run_length import plan_run
from pretrain.engine import build
from pretrain.engine.engine import PlainEngine
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED, ConfigError
from pretrain.metrics.profile import Phases, StepProfiler, check_profile, describe_phases
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.run_values import run_values
from tests.pretrain.tiny_run import curve, final_weights, stopped_after, tiny_run
from tests.refusals import assert_refused

PROFILED = {"logging__profile_steps": [[2, 3]]}
PLAIN = {"data", "forward", "backward", "optimizer"}
_COMPILED = {"training__compile": True, "training__max_steps": 3, "model__num_layers": 1}
STAGES = {*PLAIN, "reduction", "pipeline"}


def _trace(folder: Path, rank: int) -> Counter[str]:
    """How often each name is in the trace of a rank."""
    with gzip.open(folder / f"rank_{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("ph") == "X")


@pytest.mark.parametrize(
    ("axis", "phases", "communication"),
    [
        ("tensor", PLAIN, {"gloo:all_reduce"}),
        ("pipeline", STAGES, {"gloo:send", "gloo:recv"}),
    ],
    ids=["tensor", "pipeline"],
)
def test_a_profiled_run_is_the_run_without_it_bit_for_bit(
    axis: str, phases: set[str], communication: set[str], data: Path, tmp_path: Path
) -> None:
    changes = {f"parallel__{axis}": 2}
    plain = tiny_run(data, run_dir=str(tmp_path / "plain"), **changes)
    config = tiny_run(data, run_dir=str(tmp_path / "profiled"), **changes, **PROFILED)
    for each in (plain, config):
        codes = run_ranks(run_training, 2, each, "configs/ds/zero1.json", init=False)
        assert codes == [EXIT_COMPLETED] * 2
    assert curve(config) == curve(plain)
    expected = final_weights(plain)
    for name, weight in final_weights(config).items():
        assert torch.equal(weight, expected[name]), name
    folder = tmp_path / "profiled" / "profile" / "steps_2_3"
    names = [f"rank_{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for rank in (0, 1):
        found = _trace(folder, rank)
        assert {name for name in found if name in STAGES} == phases
        assert {"aten::mm", *communication} <= found.keys()
        assert [found[f"step {step}"] for step in (1, 2, 3, 4)] == [0, 1, 1, 0]
        assert found["forward"] == found["backward"] == 4, "two steps of two micro-batches"
        summary = (folder / f"rank_{rank}.txt").read_text()
        assert "aten::" in summary
        assert all(f"{phase} " in summary for phase in phases)
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_run_that_stops_and_goes_on_profiles_both_parts_of_a_range(data, tmp_path):
    config = tiny_run(data, run_dir=str(tmp_path / "run"), logging__profile_steps=[[2, 4]])
    assert run_ranks(stopped_after(3), 1, config, None, init=False) == [EXIT_STOPPED]
    assert run_ranks(run_training, 1, config, None, init=False) == [EXIT_COMPLETED]
    folders = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert folders == ["steps_2_3", "steps_4_4"]


def _run_compiled(config: Any) -> tuple[int, int, int]:
    """Exit code, and graphs and graph breaks of layers that are traced but not translated."""
    original = build.compile_layers
    build.compile_layers = lambda module, **options: original(module, **options, backend="eager")
    warnings.simplefilter("ignore", UserWarning)  # of torch, while it traces
    code = run_training(config)
    return code, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_a_profile_recompiles_no_layer(data: Path, tmp_path: Path) -> None:
    runs = [
        tiny_run(data, run_dir=str(tmp_path / name), **_COMPILED, **changes)
        for name, changes in (("plain", {}), ("profiled", PROFILED))
    ]
    [plain], [profiled] = (run_ranks(_run_compiled, 1, each, init=False) for each in runs)
    assert profiled == plain
    assert plain[0] == EXIT_COMPLETED
    assert plain[1] > 0, "nothing was compiled"
    assert curve(runs[1]) == curve(runs[0])


def test_a_profile_that_cannot_be_written_stops_nothing(data: Path, tmp_path: Path) -> None:
    config = tiny_run(data, run_dir=str(tmp_path / "run"), **PROFILED)
    (tmp_path / "run").mkdir(mode=0o750)
    (tmp_path / "run" / "profile").write_text("in the way")
    assert run_ranks(run_training, 1, config, None, init=False) == [EXIT_COMPLETED]


def _profile_with_little_space(folder: Path, limit: int) -> str | None:
    """Record a step of this process, whose files may have `limit` bytes each."""
    engine: Any = SimpleNamespace(
        ctx=SimpleNamespace(device=torch.device("cpu")), record_phases=lambda phases: None
    )
    profiler = StepProfiler(LoggingConfig(profile_steps=((1, 1),)), folder, engine, rank=0)
    profiler.start(1)
    with profiler.step(1):
        torch.ones(8, 8) @ torch.ones(8, 8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        return profiler.end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [0, 1000, 2**20])
def test_a_full_disk_leaves_no_part_of_a_profile(limit: int, tmp_path: Path) -> None:
    """Torch itself reports no full disk, and a trace that is cut off opens nowhere."""
    [told] = run_ranks(_profile_with_little_space, 1, tmp_path, limit, init=False)
    left = sorted(path.name for path in (tmp_path / "profile" / "steps_1_1").iterdir())
    assert (told is None, left) == (
        (False, ["rank_0.json.gz", "rank_0.txt"]) if limit == 2**20 else (True, [])
    )


def test_an_engine_records_phases_only_when_asked() -> None:
    engine = PlainEngine.__new__(PlainEngine)
    engine._phases = {}
    names: list[str] = []

    def phase(name: str) -> Any:
        names.append(name)
        return torch.no_grad()

    engine.record_phases(phase)
    with engine._phase("forward"):
        assert not torch.is_grad_enabled()
    engine.record_phases(None)
    with engine._phase("backward"):
        assert torch.is_grad_enabled()
    assert names == ["forward"]


def test_the_shares_of_phases_are_of_the_steps_alone() -> None:
    phases = Phases(torch.device("cpu"))
    with phases("step"), phases("forward"):
        time.sleep(0.02)
    seconds = phases.seconds()
    assert 0.02 <= seconds["forward"] <= seconds["step"]
    text = describe_phases({"step": 4.0, "forward": 1.0, "backward": 2.0})
    assert text == "forward 25%, backward 50%, other 25% of 4.000 s"
    assert describe_phases({}) == "no step was completed"


@pytest.mark.parametrize(
    ("changes", "setting", "value", "constraint", "remedy"),
    [
        ({"profile_steps": 3}, "profile_steps", "3", "ranges", "[[120, 124]]"),
        ({"profile_steps": [3, 5]}, "profile_steps", "[3, 5]", "ranges", "[[120, 124]]"),
        ({"profile_steps": [[3]]}, "profile_steps", "[[3]]", "ranges", "[[120, 124]]"),
        ({"profile_steps": [["a", 2]]}, "profile_steps", "[['a', 2]]", "ranges", "[[120, 124]]"),
        ({"profile_steps": [[3, 2]]}, "profile_steps", "[3, 2]", "", "[[120, 124]]"),
        ({"profile_steps": [[0, 2]]}, "profile_steps", "[0, 2]", "", "[[120, 124]]"),
        ({"profile_steps": [[4, 6], [6, 9]]}, "profile_steps", "[6, 9]", "ends at 6", "join"),
        ({"memory_snapshot": True}, "memory_snapshot", "true", "steps", "logging.profile_steps"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(
    changes: dict[str, Any], setting: str, value: str, constraint: str, remedy: str
) -> None:
    values = run_values(**{f"logging__{key}": each for key, each in changes.items()})
    with assert_refused(f"logging.{setting}", value, constraint, remedy, error=ConfigError):
        parse_config(values)


def test_steps_after_the_end_of_the_run_are_refused() -> None:
    config = parse_config(run_values(logging__profile_steps=[[9, 11]]))
    with assert_refused("logging.profile_steps", "[9, 11]", "10 steps", "steps of the run"):
        plan_run(config, data_size=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_memory_snapshot_is_refused_without_cuda() -> None:
    config = LoggingConfig(profile_steps=((1, 2),), memory_snapshot=True)
    with assert_refused("logging.memory_snapshot", "true", "CUDA", "remove it", error=ConfigError):
        check_profile(config)
