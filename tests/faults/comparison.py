"""The same faults on DeepSpeed alone and on a run of ours: `python -m tests.faults.comparison`.

Prints a Markdown table of what was measured; it takes about five minutes on two cores.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tests.faults import deepspeed_alone, our_runs


class Row(NamedTuple):
    """A fault, and what came of it."""

    fault: str
    deepspeed: str
    ours: str


FAULTS = {
    "stopped and started between two steps": "clean_resume",
    "SIGKILL of the writing rank, at every place of a save": "killed_in_a_save",
    "disk full on one rank in a save": "full_disk",
    "`latest` missing": "latest_missing",
    "`latest` empty": "latest_empty",
    "100 damaged files of weights and optimizer states": "damaged",
    "code in a pickle of the checkpoint": "pickled_code",
    "SIGSTOP of a rank, timeout 10 s": "stopped_rank",
    "loss not finite on one rank": "not_a_number",
    "permissions under umask 022": "modes",
}


def measure(name: str, folder: Path) -> Row:
    """One line of the table; `name` is a key of FAULTS."""
    return Row(
        name,
        *(
            _quietly(getattr(module, FAULTS[name]), folder / str(number))
            for number, module in enumerate((deepspeed_alone, our_runs))
        ),
    )


def _quietly(fault: Callable[[Path], str], folder: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return fault(folder).replace(str(folder), "RUN")


def main() -> None:
    """Print the table."""
    print(f"| fault | DeepSpeed {version('deepspeed')} alone | manyformer on it |\n|---|---|---|")
    for name in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            print("| " + " | ".join(measure(name, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
