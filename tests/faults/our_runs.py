"""The faults of `deepspeed_alone`, by the same names, on two ranks of a run of ours."""

from __future__ import annotations

import logging
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
import pretrain.engine.engine
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import FileEntry, read_manifest
from parallel.checkpoint.storage import file_record
from parallel.checkpoint.weights import WeightsError
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from pretrain.checkpointing import CheckpointStore, RunIdentity
from pretrain.config import to_yaml
from pretrain.errors import EXIT_COMPLETED
from pretrain.train import main
from tests.distributed import run_ranks
from tests.faults.damage import Tally, damages
from tests.faults.deepspeed_alone import (
    STOPPED_BOUND,
    Canary,
    describe_modes,
    ended_after,
    kinds_of_error,
    small_files,
    stop_here,
)
from tests.faults.killed_runs import Moment, read_trace, small_run, train
from tests.faults.killed_saves import crash_everywhere
from tests.faults.test_resume_cases import CASES, difference
from tests.pretrain.run_training import run_training
from tests.pretrain.stability.test_nonfinite_steps import Fault, _broken
from tests.pretrain.tiny_run import write_data

STEPS, DS_CONFIG = 4, "configs/ds/zero1.json"


def begun(folder: Path, **changes):
    """The configuration of a run that has died after its second step; both are saved."""
    folder.mkdir(parents=True)
    write_data(folder)
    config = small_run(folder / "run", steps=STEPS, interval=1, **changes)
    with pytest.raises(AssertionError, match="rank 0: exit -9"):
        train(config, folder / "begun", Moment(3, "load", 0))
    return config


def resumed(config, folder: Path) -> str:
    """The outcome of a restart, in the words of `deepspeed_alone.resumed`."""
    try:
        train(config, folder / "resumed")
    except AssertionError as error:
        return f"an error ({kinds_of_error(str(error))})"
    step = read_trace(folder / "resumed", 0)[0].step - 1
    return f"step {step}" if step else "a silent start from the beginning"


def _last_error(report: str) -> str:
    return re.findall(r"^[\w.]*(?:Error|Exception).*", report, re.MULTILINE)[0]


def clean_resume(folder: Path) -> str:
    folder.mkdir()
    write_data(folder)
    different = difference(CASES["ZeRO-1 DP2"], folder, folder)
    return f"another {different}" if different else "the same losses, bit for bit"


def killed_in_a_save(folder: Path) -> str:
    """SIGKILL before every storage operation of a save, on the rank whose it is."""
    folder.mkdir()
    points, found = crash_everywhere(folder)
    ends = Counter(f"step {step}" for steps in found for step in steps)
    return f"{sum(points)} kills: " + ", ".join(f"{n} x {end}" for end, n in sorted(ends.items()))


def full_disk(folder: Path) -> str:
    config = begun(folder)
    with pytest.raises(AssertionError) as failure:
        run_ranks(_full, 2, config, init=False)
    report = str(failure.value)
    ranks = len(
        re.findall(r"CheckpointError: step_3 was not saved, rank 1: .*File too large", report)
    )
    named = "with the path" if str(config.run_dir) in _last_error(report) else "without the path"
    latest = Path(config.run_dir, "checkpoints", "latest").read_text().strip()
    end = resumed(config, folder)
    return f"an error on {ranks} ranks, {named}; `latest` names {latest}; restart: {end}"


def _full(config) -> int:
    save = CheckpointStore.save

    def limited(self, contents, **kwargs):
        if contents.step == 3 and os.environ["RANK"] == "1":
            limit.__enter__()  # until the process ends
        return save(self, contents, **kwargs)

    limit = small_files()
    CheckpointStore.save = limited  # type: ignore[method-assign]
    return run_training(config, DS_CONFIG)


def latest_missing(folder: Path) -> str:
    config = begun(folder)
    Path(config.run_dir, "checkpoints", "latest").unlink()
    return resumed(config, folder)


def latest_empty(folder: Path) -> str:
    config = begun(folder)
    Path(config.run_dir, "checkpoints", "latest").write_text("")
    return resumed(config, folder)


def damaged(folder: Path, *, count: int = 100) -> str:
    """Of the files of weights and optimizer states of the only checkpoint, half of each."""
    config = begun(folder, checkpoint__keep=1)
    run_dir = Path(config.run_dir)
    path = run_dir / "checkpoints" / "step_2"
    manifest = read_manifest(path)
    identity = RunIdentity(manifest.layout, manifest.config, manifest.fingerprints)
    store, tally = CheckpointStore(run_dir, identity=identity, keep=1), Tally(CheckpointError)
    logging.disable(logging.WARNING)
    for kind in ("weights", "optimizer"):
        files = sorted((path / kind).iterdir())
        for file in files:
            some = list(damages(file.read_bytes(), count // 2 // len(files), random.Random(1)))
            for what in ("flipped", "truncated"):
                chosen = [each for each in some if what in each.what]
                tally.try_all(what, file, chosen, lambda: store.find("auto"))
    logging.disable(logging.NOTSET)
    store.close()
    return "; ".join(
        f"{name}: {tally.refused[what]} of {tally.trials[what]} refused"
        for name, what in (("bit flips", "flipped"), ("truncations", "truncated"))
    )


def pickled_code(folder: Path) -> str:
    """In the files of weights and optimizer, with the manifest made to fit."""
    config = begun(folder)
    path = Path(config.run_dir, "checkpoints", "step_2")
    manifest, files = read_manifest(path), {}
    for name, entry in manifest.files.items():
        if name.endswith(".safetensors"):
            torch.save({"note": Canary(folder / "canary")}, path / name)
        size, sha256 = file_record(path / name)
        files[name] = FileEntry(size=size, sha256=sha256, rank=entry.rank)
    (path / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).to_bytes())
    end = resumed(config, folder)
    with pytest.raises(WeightsError):
        ShardedWeightsReader(path)
    return f"{'executed' if (folder / 'canary').exists() else 'not executed'}, restart: {end}"


def stopped_rank(folder: Path) -> str:
    folder.mkdir()
    write_data(folder)
    config = small_run(folder / "run", steps=9, interval=9, watchdog__timeout=10.0)

    def stopping() -> None:
        original = pretrain.engine.engine.PlainEngine.train_step

        def train_step(self, *args, **kwargs):
            if self._deepspeed.global_steps == 3 and self.ctx.data.rank == 1:
                stop_here(folder)
            return original(self, *args, **kwargs)

        pretrain.engine.engine.PlainEngine.train_step = train_step  # type: ignore[method-assign]
        run_training(config, DS_CONFIG)

    return ended_after(lambda: run_ranks(stopping, 2, init=False, timeout=STOPPED_BOUND), folder)


def modes(folder: Path) -> str:
    folder.mkdir()
    write_data(folder)
    config = small_run(folder / "run", steps=STEPS, interval=1)
    (folder / "small.yaml").write_text(to_yaml(config))
    run_ranks(_command_line, 2, folder, init=False)
    return describe_modes(folder / "run")


def _command_line(folder: Path) -> None:
    os.umask(0o022)
    assert main(["--config-name", "small", "--config-dir", str(folder)]) == EXIT_COMPLETED


def not_a_number(folder: Path) -> str:
    """The loss of rank 1 becomes infinite in the third step."""
    folder.mkdir()
    write_data(folder)
    config = small_run(folder / "run", steps=STEPS, interval=1)
    ends = run_ranks(_broken, 2, config, DS_CONFIG, Fault("loss", 1), init=False)
    with ShardedWeightsReader(Path(config.run_dir, "checkpoints", f"step_{STEPS}")) as reader:
        finite = all(bool(weight.isfinite().all()) for _, weight in reader.items())
    assert [code for code, _ in ends] == [EXIT_COMPLETED] * 2
    log = next(text for _, text in ends if text)
    begins = re.findall(r"it begins on (rank \d with [^,]*),", log)
    return (
        f"{log.count('the step is skipped')} step skipped on all ranks, weights "
        f"{'finite' if finite else 'not finite'}; the log says: {begins[0]}"
    )
