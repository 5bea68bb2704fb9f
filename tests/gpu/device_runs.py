"""Runs of `pretrain/train.py` on the device under test, each started as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, to_yaml
from tests.gpu.device import DEVICE
from tests.pretrain.tiny_run import tiny_run, write_data

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0  # seconds of a run, most of which is its start


class DeviceRun:
    """A tiny run in a folder of its own; `changes` as for `tiny_run`."""

    def __init__(self, folder: Path, *, ranks: int = 1, **changes: Any) -> None:
        folder.mkdir(parents=True)
        write_data(folder)
        self.config: RunConfig = tiny_run(folder, **changes)
        (folder / "tiny.yaml").write_text(to_yaml(self.config))
        script = ["pretrain/train.py", "--config-name", "tiny", "--config-dir", str(folder)]
        launcher = [sys.executable]
        if ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run"]
            launcher += ["--nproc_per_node", str(ranks), "--standalone"]
        self.command = [*launcher, *script]

    def start(self) -> subprocess.Popen[str]:
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        if DEVICE.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def complete(self) -> str:
        """Run to the end; returns what it has printed."""
        process = self.start()
        try:
            printed, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        assert process.returncode == 0, printed
        return printed

    def kill_after(self, step: int) -> None:
        """Kill the run without warning once it has a checkpoint of `step`."""
        process, end = self.start(), time.monotonic() + TIMEOUT
        manifest = Path(self.config.run_dir, "checkpoints", f"step_{step}", "manifest.json")
        try:
            while not manifest.is_file():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < end, "no checkpoint"
                time.sleep(0.05)
        finally:
            process.kill()
            process.communicate()
