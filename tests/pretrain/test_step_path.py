"""The README's list of the files that a train step runs through."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.config import RunConfig
from pretrain.loop import TrainLoop
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data

ROOT = Path(__file__).parents[2]
MAX_FILES = 22  # of a step, nine of them the model's layers; a reader has to follow them all
_QUIET = {
    "data__num_workers": 0,
    "training__log_interval": 100,
    "evaluation__interval": 100,
    "checkpoint__interval": 100,
}


def test_a_steady_step_runs_through_the_files_that_the_readme_lists(tmp_path: Path) -> None:
    write_data(tmp_path)
    [files] = run_ranks(_files_of_step, 1, 3, tiny_run(tmp_path, **_QUIET), init=False)
    assert files == _listed()
    assert len(files) <= MAX_FILES


def _files_of_step(number: int, config: RunConfig) -> set[str]:
    """The project's files in which a function is called from this step to the next."""
    files: set[str] = set()
    prepare: Callable[..., None] = TrainLoop._prepare

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            files.add(str(path.relative_to(ROOT)))

    def prepared(loop: TrainLoop, *, first: bool) -> None:
        sys.setprofile(note if loop.state.step == number - 1 else None)
        prepare(loop, first=first)

    TrainLoop._prepare = prepared  # type: ignore[method-assign]
    run_training(config)
    return {name for name in files if not name.startswith("tests/")}


def _listed() -> set[str]:
    readme = (ROOT / "pretrain" / "README.md").read_text()
    section = readme.partition("## One train step")[2].partition("\n## ")[0]
    table = "".join(line for line in section.splitlines() if line.startswith("|"))
    return set(re.findall(r"`([\w/]+\.py)`", table))
