"""`python -m tests.evidence NAME [--seeds N]`: run one study and print its tables."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys

from parallel.cpu.compat import prepare_environment
from tests.benchmarks.timing import machine

NAMES = (
    "recall",
    "mood",
    "language",
    "cost",
    "depth",
    "hybrid",
    "drafts",
    "patches",
    "patch_recall",
    "thinking",
    "layer_memory",
)


def main() -> int:
    """The tables of one study, ready for RESULTS.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.evidence", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default 3)")
    parser.add_argument("--steps", type=int, help="of training, of the reference arm")
    options = parser.parse_args()
    prepare_environment()  # as a run does
    study = importlib.import_module(f"tests.evidence.{options.name}")
    length = {} if options.steps is None else {"steps": options.steps}
    if not length.keys() <= inspect.signature(study.tables).parameters.keys():
        parser.error(f"--steps {options.steps}: {options.name} has its own number; leave it out")
    print(f"## {options.name}\n\n{machine()}, seeds 0 to {options.seeds - 1}\n", flush=True)
    for table in study.tables(options.seeds, **length):
        print(f"{table}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
