"""A killed run goes on to the bits of an undisturbed one: at every layout, stage and family."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import numpy as np
import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.checkpoint.manifest import read_manifest
from tests.data_tools.corpora import write_corpus
from tests.faults.killed_runs import Moment, read_trace, train
from tests.models.families import CASES as FAMILIES
from tests.pretrain.tiny_run import SEQ, VOCAB, metrics, tiny_run, write_data

STEPS, SAVED, KILLED = 6, 3, 5  # the run ends, is saved, dies in this step
SAMPLES = 8  # of a step
BF16 = {"training__precision": "bf16"}


class Case(NamedTuple):
    """A run of `tensor * pipeline * data` ranks, and where in its step 5 its rank 0 dies."""

    family: str = "llama"
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    stage: int = 1
    changes: dict[str, Any] = {}  # noqa: RUF012 - read only
    place: str = "between"
    sources: dict[str, float] = {"train": 1}  # noqa: RUF012 - read only

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def config(self, folder: Path, run_dir: Path):
        accumulation = self.changes.get("training__gradient_accumulation_steps", 2)
        return tiny_run(
            folder,
            run_dir=str(run_dir),
            **{
                "data__train": [
                    {"path": str(folder / name), "weight": weight}
                    for name, weight in self.sources.items()
                ],
                "model": FAMILIES[self.family].config.model_dump(),
                "parallel__tensor": self.tensor,
                "parallel__pipeline": self.pipeline,
                "training__max_steps": STEPS,
                "training__batch_size": SAMPLES // accumulation // self.data,
                "checkpoint__interval": SAVED,
                "evaluation__interval": STEPS,
            }
            | self.changes,
        )


STAGES = [{"until_step": SAVED, "sequence_length": SEQ // 4}, {"sequence_length": SEQ}]
CASES = {
    "ZeRO-0": Case(stage=0),
    "ZeRO-0 DP2": Case(data=2, stage=0),
    "ZeRO-1": Case(),
    "ZeRO-1 DP2": Case(data=2),
    "ZeRO-2 DP2": Case(data=2, stage=2),
    "ZeRO-3 DP2": Case(data=2, stage=3),
    "bf16 ZeRO-1": Case(changes=BF16),
    "bf16 ZeRO-2 DP2": Case(data=2, stage=2, changes=BF16),
    "bf16 ZeRO-3 DP2": Case(data=2, stage=3, changes=BF16),
    "TP2 ZeRO-0": Case(tensor=2, stage=0),
    "TP2 ZeRO-1": Case(tensor=2),
    "TP2 ZeRO-2": Case(tensor=2, stage=2),
    "TP2 ZeRO-3": Case(tensor=2, stage=3),
    "TP2 sequence parallel, bf16": Case(
        tensor=2, changes={"parallel__sequence_parallel": True, **BF16}
    ),
    "TP2 DP2 ZeRO-3": Case(tensor=2, data=2, stage=3),
    "PP2": Case(pipeline=2),
    "PP2 bf16": Case(pipeline=2, changes=BF16),
    "PP2 TP2": Case(pipeline=2, tensor=2),
    "PP2 DP2": Case(pipeline=2, data=2),
    "tied embeddings, PP2": Case("llama_qwen2_shape", pipeline=2),
    "daria_former ZeRO-0": Case("daria_former", stage=0),
    "daria_former TP2": Case("daria_former", tensor=2),
    "daria_former PP2 bf16": Case("daria_former", pipeline=2, changes=BF16),
    "daria_former ZeRO-3 DP2": Case("daria_former", data=2, stage=3),
    "mod ZeRO-2 DP2 bf16": Case("mod", data=2, stage=2, changes=BF16),
    "mod PP2": Case("mod", pipeline=2),
    "dtf ZeRO-1": Case("dtf"),
    "dtf TP2 bf16": Case("dtf", tensor=2, changes=BF16),
    "dtf PP2": Case("dtf", pipeline=2),
    "expert 2, ZeRO-1": Case("mod_experts", data=2, changes={"parallel__expert": 2}),
    "expert 2, ZeRO-2 bf16": Case(
        "mod_experts", data=2, stage=2, changes={"parallel__expert": 2, **BF16}
    ),
    "muon, DeepSpeed's own files": Case(changes={"training__optimizer": "muon", **BF16}),
    "epoch edge": Case(data=2, sources={"epoch": 1}),
    "inside an epoch": Case(data=2, sources={"epoch": 1}, changes={"checkpoint__interval": 4}),
    "inside an accumulation": Case(
        changes={"training__gradient_accumulation_steps": 4}, place="load"
    ),
    "four micro-batches, PP2": Case(
        pipeline=2, changes={"training__gradient_accumulation_steps": 4}
    ),
    "two sources": Case(data=2, sources={"train": 3, "epoch": 1}),
    "stage edge": Case(data=2, changes={"data__stages": STAGES}),
    "documents apart": Case(changes={"data__reset_at_documents": True}),
    "data workers": Case(data=2, changes={"data__num_workers": 2}, place="load"),
    "recomputation": Case(changes={"training__activation_recomputation": "full"}),
}
# What the runs of tests/pretrain/checkpointing/test_resume.py do not show.
ORDINARY = ("expert 2, ZeRO-2 bf16", "epoch edge", "inside an accumulation", "dtf PP2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, of which `epoch` is read exactly once in the steps up to the checkpoint."""
    directory = tmp_path_factory.mktemp("corpora")
    write_data(directory)
    ids = np.random.default_rng(1).integers(VOCAB, size=SAVED * SAMPLES * SEQ + 1)
    write_corpus(directory / "epoch", np.split(ids, range(50, len(ids), 50)), vocab_size=VOCAB)
    return directory


def difference(case: Case, folder: Path, tmp_path: Path) -> str | None:
    """The difference to the undisturbed run; None when every bit is equal."""
    names = ("undisturbed", "killed")
    whole, killed = (case.config(folder, tmp_path / name) for name in names)
    kwargs = {"size": case.size, "stage": case.stage}
    train(whole, tmp_path / "whole", **kwargs)
    with pytest.raises(AssertionError, match="rank 0: exit -9"):
        train(killed, tmp_path / "attempt", Moment(KILLED, case.place, 0), **kwargs)
    train(killed, tmp_path / "resumed", **kwargs)
    resumed = SAVED if case.changes.get("checkpoint__interval", SAVED) == SAVED else 4
    for rank in range(case.size):
        trace = read_trace(tmp_path / "resumed", rank)
        if trace != read_trace(tmp_path / "whole", rank)[resumed:]:
            return f"samples, loss or norm of rank {rank}"
    if _curve(killed) != _curve(whole):
        return "the curve"
    files, expected = _files(killed), _files(whole)
    different = sorted(name for name in expected if files.get(name) != expected[name])
    return ", ".join(different) or None


def _curve(config) -> list[tuple[float, ...]]:
    trained, evaluated = metrics(config)
    curve = [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in trained]
    return curve + [(r["step"], r["eval_loss"]) for r in evaluated]


def _files(config) -> dict[str, str]:
    """SHA-256 of weights, optimizer, random numbers and place in the data after the last step."""
    manifest = read_manifest(Path(config.run_dir, "checkpoints", f"step_{STEPS}"))
    return {name: entry.sha256 for name, entry in manifest.files.items()}


@pytest.mark.parametrize("name", ORDINARY)
def test_a_killed_run_goes_on_to_the_same_bits(name: str, folder: Path, tmp_path: Path) -> None:
    assert difference(CASES[name], folder, tmp_path) is None


@pytest.mark.slow
def test_killed_runs_of_every_kind_go_on_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        (tmp_path / str(number)).mkdir()
        found[name] = difference(case, folder, tmp_path / str(number))
    same = sum(each is None for each in found.values())
    print(f"\nresume: {same} of {len(found)} cases equal bit for bit: {', '.join(found)}")
    assert {name: each for name, each in found.items() if each is not None} == {}
    assert len(found) >= 24
