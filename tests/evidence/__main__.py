"""`python -m tests.evidence NAME [--seeds N]`: run one study and print its tables."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from pathlib import Path

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
    "prose.curriculum",
    "layer_memory",
    "layer_language",
    "layer_cost",
    "chains",
)


def main() -> int:
    """The tables of one study, ready for RESULTS.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.evidence", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default 3)")
    parser.add_argument("--steps", type=int, help="of training, of the reference arm")
    parser.add_argument("--model", type=Path, help="folder of a pretrained model (layer_memory)")
    parser.add_argument("--text", type=Path, help="folder of documents (patches), or of sources")
    parser.add_argument("--json", type=Path, help="file to write the tables to, too")
    options = parser.parse_args()
    prepare_environment()  # as a run does
    study = importlib.import_module(f"tests.evidence.{options.name}")
    given = {"steps": options.steps, "model": options.model, "text": options.text}
    settings = {name: value for name, value in given.items() if value is not None}
    for name in settings.keys() - inspect.signature(study.tables).parameters.keys():
        parser.error(f"--{name} {settings[name]}: {options.name} has its own; leave it out")
    print(f"## {options.name}\n\n{machine()}, seeds 0 to {options.seeds - 1}\n", flush=True)
    tables = []
    for table in study.tables(options.seeds, **settings):
        print(f"{table}\n", flush=True)
        tables.append(table._asdict())
        if options.json is not None:
            options.json.write_text(json.dumps({"machine": machine(), "tables": tables}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
